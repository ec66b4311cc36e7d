// As much of CUDA as kernels without tensor cores use, on a CPU.
//
// A block's threads are fibers of one thread, switched where threads wait for each other: at a
// barrier of the block, and wherever a warp exchanges values. What only some threads reach ends the
// process with a message, because on a GPU it would be undefined.
#ifndef LLMC_CUDA_SHIM
#define LLMC_CUDA_SHIM
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline

typedef _Float16 half;
struct __half2 {
  half x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline __half2 __floats2half2_rn(float a, float b) { return {(half)a, (half)b}; }
inline __half2 __float2half2_rn(float a) { return {(half)a, (half)a}; }
inline __half2 __half2half2(half a) { return {a, a}; }
inline float2 __half22float2(__half2 a) { return {(float)a.x, (float)a.y}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {(half)(a.x - b.x), (half)(a.y - b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {(half)(a.x * b.x), (half)(a.y * b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {(half)std::fma((float)a.x, (float)b.x, (float)c.x),
          (half)std::fma((float)a.y, (float)b.y, (float)c.y)};
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}

template <typename T>
T __ldcs(const T* at) {
  return *at;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline int __float2int_rn(float x) { return (int)std::nearbyint(x); }
inline int max(int a, int b) { return a < b ? b : a; }
inline int min(int a, int b) { return b < a ? b : a; }
inline size_t __cvta_generic_to_shared(const void* at) { return (size_t)at; }

namespace shim {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

enum class Wait { kNone, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Wait wait = Wait::kNone;
  unsigned shown[6] = {};  // to its warp
};

inline std::vector<Fiber> fibers;
inline int current = 0;
inline ucontext_t scheduler;
inline void (*body)() = nullptr;

inline void wait(Wait kind) {
  fibers[current].wait = kind;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void enter() {
  body();
  wait(Wait::kDone);
}

// Lets those of `count` fibers go on that all wait for the same; whether there were any.
inline bool release(int first, int count, Wait kind) {
  for (int i = first; i < first + count; ++i)
    if (fibers[i].wait != kind) return false;
  for (int i = first; i < first + count; ++i) fibers[i].wait = Wait::kNone;
  return true;
}

// One block of so many threads.
inline void run(int threads, void (*function)()) {
  body = function;
  fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  while (true) {
    for (current = 0; current < threads; ++current)
      if (fibers[current].wait == Wait::kNone)
        swapcontext(&scheduler, &fibers[current].context);
    bool released = release(0, threads, Wait::kBlock);
    for (int warp = 0; warp < threads; warp += kWarp)
      released |= release(warp, kWarp, Wait::kWarp);
    if (released) continue;
    for (const Fiber& fiber : fibers)
      if (fiber.wait != Wait::kDone) {
        std::fprintf(stderr, "cuda shim: only some threads wait for the others\n");
        std::abort();
      }
    return;
  }
}

}  // namespace shim

inline struct {
  struct {
    operator int() const { return shim::current; }
  } x;
} threadIdx;

inline void __syncthreads() { shim::wait(shim::Wait::kBlock); }
inline void __syncwarp() { shim::wait(shim::Wait::kWarp); }
// What thread `from` of the block, of the same warp, shows at the same place.
template <typename T>
T shown_by(T value, int from) {
  static_assert(sizeof(T) == 4);
  std::memcpy(shim::fibers[shim::current].shown, &value, 4);
  __syncwarp();
  std::memcpy(&value, shim::fibers[from].shown, 4);
  __syncwarp();  // nobody shows another value before all have seen this one
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shown_by(value, shim::current ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return shown_by(value, shim::current / 32 * 32 + lane);
}

// mma.sync m16n8k16, as PTX describes what each thread of a warp holds: thread 4g + t of rows g and
// g + 8 (of column g, of B) the pairs of features 2t and 2t + 8, of sums columns 2t and 2t + 1.
template <typename Unpack>
void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Unpack unpack) {
  unsigned* shown = shim::fibers[shim::current].shown;
  std::memcpy(shown, a, 16);
  std::memcpy(shown + 4, b, 8);
  __syncwarp();
  const int lane = shim::current % 32, g = lane / 4, t = lane % 4;
  const shim::Fiber* warp = shim::fibers.data() + shim::current - lane;
  for (int e = 0; e < 4; ++e)
    for (int feature = 0; feature < 8; ++feature) {
      const int pair = feature / 4;
      const float2 x = unpack(warp[4 * g + feature % 4].shown[2 * pair + e / 2]);
      const float2 y = unpack(warp[4 * (2 * t + e % 2) + feature % 4].shown[4 + pair]);
      d[e] += x.x * y.x + x.y * y.y;
    }
  __syncwarp();
}
#endif
