// bfloat16 on a CPU.
#ifndef LLMC_CUDA_SHIM_BF16
#define LLMC_CUDA_SHIM_BF16
#include "cuda_fp16.h"

struct __nv_bfloat16 {
  uint16_t bits = 0;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    const unsigned whole = __float_as_uint(value);
    bits = (uint16_t)((whole + 0x7fffu + (whole >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__nv_bfloat16(a), __nv_bfloat16(b)};
}
#endif
