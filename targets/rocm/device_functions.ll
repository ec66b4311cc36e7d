; Linked into every module of kernels. Version 5 of code objects is read by ROCm 5.7 and newer.

; TVM's barrier waits for no memory: on these architectures the instruction does not either, and
; a thread could read shared memory before another's stores have reached it.
define linkonce_odr hidden void @llmc_barrier() alwaysinline convergent {
  fence syncscope("workgroup") release
  call void @llvm.amdgcn.s.barrier()
  fence syncscope("workgroup") acquire
  ret void
}

declare void @llvm.amdgcn.s.barrier()

!llvm.module.flags = !{!0}
!0 = !{i32 1, !"amdhsa_code_object_version", i32 500}
