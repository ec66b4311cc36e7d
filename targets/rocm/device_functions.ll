; Linked into every module of kernels. Version 5 of code objects is read by ROCm 5.7 and newer.

; TVM's barrier waits for no memory: on these architectures the instruction does not either, and
; a thread could read shared memory before another's stores have reached it.
define linkonce_odr hidden void @llmc_barrier() alwaysinline convergent {
  fence syncscope("workgroup") release
  call void @llvm.amdgcn.s.barrier()
  fence syncscope("workgroup") acquire
  ret void
}

; Reductions over a wavefront: every lane adds its partner's value, then its pair's partner's and so
; on. Up to 16 lanes partners come by data-parallel primitives: the other of two lanes, of two pairs,
; then mirrored in eight and in 16 lanes, where mirroring pairs whole groups of equal values. All
; lanes add the same numbers in the same order but for the operands' places: all get the same sum.
define linkonce_odr hidden float @llmc_sum32(float %v0) alwaysinline convergent {
  %b0 = bitcast float %v0 to i32
  %p0 = call i32 @llvm.amdgcn.update.dpp.i32(i32 %b0, i32 %b0, i32 177, i32 15, i32 15, i1 true)  ; quad_perm [1, 0, 3, 2]
  %f0 = bitcast i32 %p0 to float
  %v1 = fadd float %v0, %f0
  %b1 = bitcast float %v1 to i32
  %p1 = call i32 @llvm.amdgcn.update.dpp.i32(i32 %b1, i32 %b1, i32 78, i32 15, i32 15, i1 true)  ; quad_perm [2, 3, 0, 1]
  %f1 = bitcast i32 %p1 to float
  %v2 = fadd float %v1, %f1
  %b2 = bitcast float %v2 to i32
  %p2 = call i32 @llvm.amdgcn.update.dpp.i32(i32 %b2, i32 %b2, i32 321, i32 15, i32 15, i1 true)  ; row_half_mirror
  %f2 = bitcast i32 %p2 to float
  %v3 = fadd float %v2, %f2
  %b3 = bitcast float %v3 to i32
  %p3 = call i32 @llvm.amdgcn.update.dpp.i32(i32 %b3, i32 %b3, i32 320, i32 15, i32 15, i1 true)  ; row_mirror
  %f3 = bitcast i32 %p3 to float
  %v4 = fadd float %v3, %f3
  %b4 = bitcast float %v4 to i32
  %p4 = call i32 @llvm.amdgcn.ds.swizzle(i32 %b4, i32 16415)  ; lane xor 16
  %f4 = bitcast i32 %p4 to float
  %v5 = fadd float %v4, %f4
  ret float %v5
}

define linkonce_odr hidden float @llmc_sum64(float %v0) alwaysinline convergent {
  %half = call float @llmc_sum32(float %v0)
  %bits = bitcast float %half to i32
  %low = call i32 @llvm.amdgcn.readlane.i32(i32 %bits, i32 0)
  %high = call i32 @llvm.amdgcn.readlane.i32(i32 %bits, i32 32)
  %a = bitcast i32 %low to float
  %b = bitcast i32 %high to float
  %v = fadd float %a, %b
  ret float %v
}

define linkonce_odr hidden float @llmc_maximum32(float %v0) alwaysinline convergent {
  %b0 = bitcast float %v0 to i32
  %p0 = call i32 @llvm.amdgcn.update.dpp.i32(i32 %b0, i32 %b0, i32 177, i32 15, i32 15, i1 true)  ; quad_perm [1, 0, 3, 2]
  %f0 = bitcast i32 %p0 to float
  %v1 = call float @llvm.maxnum.f32(float %v0, float %f0)
  %b1 = bitcast float %v1 to i32
  %p1 = call i32 @llvm.amdgcn.update.dpp.i32(i32 %b1, i32 %b1, i32 78, i32 15, i32 15, i1 true)  ; quad_perm [2, 3, 0, 1]
  %f1 = bitcast i32 %p1 to float
  %v2 = call float @llvm.maxnum.f32(float %v1, float %f1)
  %b2 = bitcast float %v2 to i32
  %p2 = call i32 @llvm.amdgcn.update.dpp.i32(i32 %b2, i32 %b2, i32 321, i32 15, i32 15, i1 true)  ; row_half_mirror
  %f2 = bitcast i32 %p2 to float
  %v3 = call float @llvm.maxnum.f32(float %v2, float %f2)
  %b3 = bitcast float %v3 to i32
  %p3 = call i32 @llvm.amdgcn.update.dpp.i32(i32 %b3, i32 %b3, i32 320, i32 15, i32 15, i1 true)  ; row_mirror
  %f3 = bitcast i32 %p3 to float
  %v4 = call float @llvm.maxnum.f32(float %v3, float %f3)
  %b4 = bitcast float %v4 to i32
  %p4 = call i32 @llvm.amdgcn.ds.swizzle(i32 %b4, i32 16415)  ; lane xor 16
  %f4 = bitcast i32 %p4 to float
  %v5 = call float @llvm.maxnum.f32(float %v4, float %f4)
  ret float %v5
}

define linkonce_odr hidden float @llmc_maximum64(float %v0) alwaysinline convergent {
  %half = call float @llmc_maximum32(float %v0)
  %bits = bitcast float %half to i32
  %low = call i32 @llvm.amdgcn.readlane.i32(i32 %bits, i32 0)
  %high = call i32 @llvm.amdgcn.readlane.i32(i32 %bits, i32 32)
  %a = bitcast i32 %low to float
  %b = bitcast i32 %high to float
  %v = call float @llvm.maxnum.f32(float %a, float %b)
  ret float %v
}

declare void @llvm.amdgcn.s.barrier()
declare i32 @llvm.amdgcn.update.dpp.i32(i32, i32, i32 immarg, i32 immarg, i32 immarg, i1 immarg)
declare i32 @llvm.amdgcn.ds.swizzle(i32, i32 immarg)
declare i32 @llvm.amdgcn.readlane.i32(i32, i32)
declare float @llvm.maxnum.f32(float, float)

!llvm.module.flags = !{!0}
!0 = !{i32 1, !"amdhsa_code_object_version", i32 500}
