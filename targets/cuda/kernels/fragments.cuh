// What kernels on tensor cores share: pairs of 16-bit floats, mma.sync and asynchronous copies
// (sm_80 and newer), wgmma (sm_90a).
#ifndef LLMC_FRAGMENTS
#define LLMC_FRAGMENTS
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace llmc {

typedef unsigned int u32;

__device__ __forceinline__ u32 pack(float a, float b, half) {
  const float top = 65504.f;  // a float16 that is too large would become an infinity
  __half2 h = __floats2half2_rn(fminf(fmaxf(a, -top), top), fminf(fmaxf(b, -top), top));
  return *reinterpret_cast<u32*>(&h);
}
__device__ __forceinline__ u32 pack(float a, float b, __nv_bfloat16) {
  __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<u32*>(&h);
}

__device__ __forceinline__ float2 unpack(u32 bits, half) {
  return __half22float2(*reinterpret_cast<__half2*>(&bits));
}
__device__ __forceinline__ float2 unpack(u32 bits, __nv_bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Waits for what the launch before wrote (see launches.py). What stands before it must not read that,
// nor write.
__device__ __forceinline__ void await_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the launch behind start.
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_inputs() {
  await_launch();
  allow_next();
}

__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                                    half) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                                    __nv_bfloat16) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes to shared memory; zeros where `valid` is false.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
  const u32 address = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A matrix in shared memory for wgmma, in pieces of 8 by 8 elements that are 128 bytes each: how
// far it is to the next along the features that are summed over, and across them. (Of a matrix that
// is read transposed, the instruction wants them the other way round.)
__device__ __forceinline__ unsigned long long describe(const char* at, int along, int across) {
  const unsigned long long start = ((u32)__cvta_generic_to_shared(at) & 0x3ffffu) >> 4;
  return start | (unsigned long long)(along >> 4) << 16 | (unsigned long long)(across >> 4) << 32;
}

// multiply_group: 64 rows by N columns of 16 features, by 128 threads, into sums that lie as mma's.
// The rows are in shared memory, or are fragments as mma's; columns may be read transposed.
#define LLMC_4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define LLMC_16(d, j) LLMC_4(d, j), LLMC_4(d, j + 1), LLMC_4(d, j + 2), LLMC_4(d, j + 3)
#define LLMC_SUMS_16(d) LLMC_4(d, 0), LLMC_4(d, 1)
#define LLMC_SUMS_32(d) LLMC_16(d, 0)
#define LLMC_SUMS_64(d) LLMC_16(d, 0), LLMC_16(d, 4)
#define LLMC_SUMS_128(d) LLMC_SUMS_64(d), LLMC_16(d, 8), LLMC_16(d, 12)
#define LLMC_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LLMC_TEXT_32 LLMC_TEXT_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LLMC_TEXT_64                                                                         \
  LLMC_TEXT_32 ", %16, %17, %18, %19, %20, %21, %22, %23, "                                  \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define LLMC_TEXT_128                                                                        \
  LLMC_TEXT_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "    \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LLMC_MULTIPLY_GROUP(N, FLOAT, TYPE, SHARED, HELD)                                    \
  template <bool kAdd = true>                                                                \
  __device__ __forceinline__ void multiply_group(float (&d)[N / 8][4], unsigned long long a, \
                                                 unsigned long long b, FLOAT) {              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE             \
                 " {" LLMC_TEXT_##N "}, " SHARED ", 1, 1, 0, 0;"                             \
                 : LLMC_SUMS_##N(d)                                                          \
                 : "l"(a), "l"(b), "n"((int)kAdd));                                          \
  }                                                                                          \
  template <bool kAdd, bool kTransposed>                                                     \
  __device__ __forceinline__ void multiply_group(float (&d)[N / 8][4], const u32 (&a)[4],    \
                                                 unsigned long long b, FLOAT) {              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE             \
                 " {" LLMC_TEXT_##N "}, " HELD ";"                                           \
                 : LLMC_SUMS_##N(d)                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"((int)kAdd),       \
                   "n"((int)kTransposed));                                                   \
  }
#define LLMC_MULTIPLY_GROUPS(N, SHARED, HELD)                \
  LLMC_MULTIPLY_GROUP(N, half, "f16", SHARED, HELD)          \
  LLMC_MULTIPLY_GROUP(N, __nv_bfloat16, "bf16", SHARED, HELD)
LLMC_MULTIPLY_GROUPS(16, "%8, %9, %10", "{%8, %9, %10, %11}, %12, %13, 1, 1, %14")
LLMC_MULTIPLY_GROUPS(32, "%16, %17, %18", "{%16, %17, %18, %19}, %20, %21, 1, 1, %22")
LLMC_MULTIPLY_GROUPS(64, "%32, %33, %34", "{%32, %33, %34, %35}, %36, %37, 1, 1, %38")
LLMC_MULTIPLY_GROUPS(128, "%64, %65, %66", "{%64, %65, %66, %67}, %68, %69, 1, 1, %70")
#undef LLMC_MULTIPLY_GROUPS
#undef LLMC_MULTIPLY_GROUP

__device__ __forceinline__ void begin_groups() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_groups() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_groups() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// What threads copied to shared memory is seen by wgmma after this and a barrier.
__device__ __forceinline__ void publish() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif

}  // namespace llmc
#endif
