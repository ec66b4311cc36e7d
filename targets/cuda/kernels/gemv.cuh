// Products of one token: y[M] = w[M, K] * x, with what stands before and behind them.
//
// What counts is to read each weight once, at the memory's speed. Blocks stay: each makes every
// gridDim-th tile of 16 rows, its warps share a tile's superblocks (see tensor_cores.cuh), and a
// thread's next weights are on their way while it multiplies the last ones, from one tile to the
// next. Weights of 16 bits are multiplied in float32. To turn codes into floats would take longer than
// to read them: instead x becomes 16-bit integers, a scale for as many features as share a weight's
// scale in a chunk, which are 256 times one signed byte plus another; each is multiplied by four
// codes at a time (dp4a). Such sums are exact, and x keeps more of its bits than it would as a
// float16.
//
// RMSNorm of x and a gated activation of the sums cost no pass over memory here.
#ifndef LLMC_GEMV
#define LLMC_GEMV

namespace llmc {

enum Gate { kNone, kSilu, kGelu, kGeluTanh, kRelu };

template <int kGate>
__device__ __forceinline__ float activate(float x) {
  if (kGate == kSilu) return x / (1.f + __expf(-x));
  if (kGate == kGelu) return 0.5f * x * (1.f + erff(x * 0.70710678f));
  if (kGate == kGeluTanh) {
    const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
    return x - x / (__expf(2.f * inner) + 1.f);
  }
  return fmaxf(x, 0.f);
}

// RMSNorm's weight[K] and numbers; weight null where x is taken as it is.
template <typename Vector>
struct Norm {
  const Vector* weight;
  float eps, offset;
};

// Four bytes of codes (signed or not) times four of x plus sum.
template <bool kSigned>
__device__ __forceinline__ int dot(u32 codes, u32 x, int sum) {
  if (kSigned) asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(codes), "r"(x));
  else asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(codes), "r"(x));
  return sum;
}

// The sum of every thread's value.
template <int kThreads>
__device__ __forceinline__ float total(float value, float* shared) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.f;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) value += shared[warp];
  return value;
}

// Eight features that lie side by side.
template <typename Data>
__device__ __forceinline__ void load_whole(float (&to)[8], const Data* from) {
  uint4 raw[sizeof(Data) / 2];
#pragma unroll
  for (int i = 0; i < sizeof(Data) / 2; ++i)
    raw[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = (float)reinterpret_cast<const Data*>(raw)[i];
}

// x as a block multiplies it: its features from `begin` on, normalized where there is a norm, in
// shared memory. Of codes, kPart features share a scale, and each kSum of them have their sum.
template <class F, int kThreads, int kPart, int kSum, int kTogether, bool kNorm, typename Data,
          typename Vector>
struct Activations {
  static const bool kFloats = F::kBits == 16;
  const Norm<Vector> norm;
  const int begin, features, blocks;  // superblocks that are filled up
  float values[kTogether][8], weights[kTogether][8];

  // Before the input is there: its norm's weights.
  __device__ __forceinline__ Activations(const Norm<Vector>& norm, int begin, int features,
                                         int blocks)
      : norm(norm), begin(begin), features(features), blocks(blocks) {
    if (kNorm)
#pragma unroll
      for (int r = 0; r < kTogether; ++r)
        load(weights[r], norm.weight, r * kThreads + threadIdx.x);
  }

  // The i-th eight of its features; zeros behind the last.
  template <typename From>
  __device__ __forceinline__ void load(float (&to)[8], const From* from, int i) const {
    if (8 * i < features) {
      load_whole(to, from + begin + 8 * i);
      return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = 0.f;
  }

  __device__ __forceinline__ float squares(const float (&v)[8]) const {
    float sum = 0.f;
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += v[e] * v[e];
    return sum;
  }

  // Leaves x[K] in `to`; `shared` is a float for each warp.
  __device__ __forceinline__ void arrange(const Data* x, int k, char* to, float* shared) {
#pragma unroll
    for (int r = 0; r < kTogether; ++r) load(values[r], x, r * kThreads + threadIdx.x);
    float scale = 1.f;
    if (kNorm) {
      float sum = 0.f;
#pragma unroll
      for (int r = 0; r < kTogether; ++r) sum += squares(values[r]);
      for (int i = threadIdx.x; i < k / 8; i += kThreads) {
        const int mine = i - begin / 8;
        if (mine >= 0 && mine < min(features / 8, kTogether * kThreads)) continue;
        float others[8];
        load_whole(others, x + 8 * i);
        sum += squares(others);
      }
      scale = rsqrtf(total<kThreads>(sum, shared) / k + norm.eps);
    }
    // All threads come here equally often: those that share a part exchange what they found.
    const int count = blocks * F::kBlock / 8;
    for (int first = 0; first < count; first += kTogether * kThreads) {
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int i = first + r * kThreads + threadIdx.x;
        if (first) {
          load(values[r], x, i);
          if (kNorm) {
            float more[8];
            load(more, norm.weight, i);
#pragma unroll
            for (int e = 0; e < 8; ++e) values[r][e] *= scale * (more[e] + norm.offset);
          }
        } else if (kNorm) {
#pragma unroll
          for (int e = 0; e < 8; ++e) values[r][e] *= scale * (weights[r][e] + norm.offset);
        }
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r)
        keep(values[r], to, first + r * kThreads + threadIdx.x, count);
    }
    __syncthreads();
  }

  // The i-th eight features of `count`: as they are, or as bytes in the order of their codes.
  __device__ __forceinline__ void keep(const float (&v)[8], char* to, int i, int count) const {
    if (kFloats) {
      if (i < count)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          reinterpret_cast<float4*>(to)[2 * i + j] =
              make_float4(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
      return;
    }
    float most = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) most = fmaxf(most, fabsf(v[j]));
#pragma unroll
    for (int other = 1; other < kPart / 8; other *= 2)
      most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
    const float inverse = most > 0.f ? 32512.f / most : 0.f;
    int sum = 0;
    u32 words[4] = {};  // bytes of four features: two of upper ones, two of lower ones
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int feature = F::kBits == 8 ? j : j / 4 * 2 + j / 2 % 2 + j % 2 * 4;
      const int value = __float2int_rn(v[feature] * inverse);
      sum += value;
      words[j / 4] |= (u32)((value + 128) >> 8 & 255) << j % 4 * 8;
      words[2 + j / 4] |= (u32)(value & 255) << j % 4 * 8;
    }
#pragma unroll
    for (int other = 1; other < kSum / 8; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
    if (i >= count) return;
    reinterpret_cast<uint4*>(to)[i] = make_uint4(words[0], words[1], words[2], words[3]);
    if (i % (kSum / 8) == 0)
      reinterpret_cast<float2*>(to + blocks * F::kBlock * 2)[i / (kSum / 8)] =
          make_float2(most / 32512.f, (float)sum);
  }
};

// What a thread has of `kAhead` superblocks: rows g and g + 8 of its chunk.
template <class F, int kAhead>
struct Ahead {
  uint4 raw[kAhead][2];
  typename F::Scale scale[kAhead][2][F::kChunkScales], min[kAhead][2][F::kChunkScales];
};

template <class F, int kWarps, int kAhead>
struct Gemv {
  static const int kThreads = kWarps * 32;
  static const bool kFloats = F::kBits == 16;
  // Features of x that share a scale: those of a chunk with one scale.
  static const int kPart = F::kChunk / F::kChunkScales;
  static const int kPartWords = 4 / F::kChunkScales;

  // Superblock `first` and every kWarps-th after it, of the 16 rows from `row` on.
  static __device__ __forceinline__ void load(Ahead<F, kAhead>& to, const Matrix& w, int row,
                                              int first) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int panel = row / 32, place = row % 32 + g;
    const uint4* codes = static_cast<const uint4*>(w.codes) + (size_t)panel * w.chunks * 32 + place;
    const size_t begin = (size_t)panel * w.groups * 32 + place;
    const typename F::Scale* scales = static_cast<const typename F::Scale*>(w.scales) + begin;
    const typename F::Scale* mins = static_cast<const typename F::Scale*>(w.mins) + begin;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int block = first + u * kWarps, chunk = block * 4 + t;
      const bool valid = chunk < w.chunks;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        to.raw[u][r] = valid ? __ldcs(codes + chunk * 32 + r * 8) : make_uint4(0, 0, 0, 0);
        if (F::kScaled) {
#pragma unroll
          for (int part = 0; part < F::kChunkScales; ++part) {
            const int group = block * F::kScales / F::kBlocksPerScale + scale_of<F>(t, part);
            const int at = group * 32 + r * 8;
            to.scale[u][r][part] = valid ? scales[at] : (typename F::Scale)0.f;
            if (F::kMin) to.min[u][r][part] = valid ? mins[at] : (typename F::Scale)0.f;
          }
        }
      }
    }
  }

  // Adds the products of superblocks, whose thread has rows g and g + 8 of its own chunk.
  static __device__ __forceinline__ void multiply(float (&sums)[2], const Ahead<F, kAhead>& from,
                                                  const char* x, int first, int blocks) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int block = first + u * kWarps;
      if (block >= blocks) break;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        sums[r] += product(from.raw[u][r], from.scale[u][r], from.min[u][r], x, block * 4 + t, blocks);
    }
  }

  // A row's chunk times the same features of x, of which `blocks` superblocks are arranged.
  static __device__ __forceinline__ float product(
      const uint4& raw, const typename F::Scale (&scale)[F::kChunkScales],
      const typename F::Scale (&min)[F::kChunkScales], const char* x, int chunk, int blocks) {
    const u32 words[5] = {raw.x, raw.y, raw.z, raw.w, 0};
    float sum = 0.f;
    if (kFloats) {
      const float4* at = reinterpret_cast<const float4*>(x) + chunk * 2;
      const float4 low = at[0], high = at[1];
      const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack(words[i], typename F::Float());
        sum += pair.x * values[2 * i];
        sum += pair.y * values[2 * i + 1];
      }
      return sum;
    }
    const float2* parts = reinterpret_cast<const float2*>(x + blocks * F::kBlock * 2);
#pragma unroll
    for (int part = 0; part < F::kChunkScales; ++part) {
      int upper = 0, lower = 0;
#pragma unroll
      for (int i = 0; i < kPartWords; i += F::kBits == 8 ? 2 : 1) {
        const int word = part * kPartWords + i;
        // The bytes of eight features: four upper, four upper, four lower, four lower.
        const uint4 bytes = reinterpret_cast<const uint4*>(
            x)[chunk * (F::kChunk / 8) + (F::kBits == 8 ? word / 2 : word)];
        const u32 low = F::kBits == 8 ? words[word] : words[word] & 0x0f0f0f0fu;
        const u32 high = F::kBits == 8 ? words[word + 1] : words[word] >> 4 & 0x0f0f0f0fu;
        upper = dot<F::kSigned>(low, bytes.x, upper);
        upper = dot<F::kSigned>(high, bytes.y, upper);
        lower = dot<F::kSigned>(low, bytes.z, lower);
        lower = dot<F::kSigned>(high, bytes.w, lower);
      }
      const float2 whole = parts[chunk * F::kChunkScales + part];  // of x: its scale, its sum
      float value = (float)(upper * 256 + lower);
      if (F::kZero) value -= F::kZero * whole.y;
      value *= whole.x;
      if (F::kScaled) value *= (float)scale[part];
      if (F::kMin) value += (float)min[part] * (whole.x * whole.y);
      sum += value;
    }
    return sum;
  }

  template <bool kNorm, int kGate, typename Data, typename Vector, typename NormVector>
  static __device__ __forceinline__ void run(const Matrix& w, const Data* x,
                                             const Norm<NormVector>& norm,
                                             const Epilogue<Data, Vector>& out, int first_tile,
                                             int stride, char* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int blocks = (w.chunks + 3) / 4, kParts = kGate ? 2 : 1;
    const int tiles = (out.m + 15) / 16, step = kWarps * kAhead;
    float* sums_of_warps = reinterpret_cast<float*>(shared);  // [2][kWarps][16]
    char* arranged = shared + 2 * kWarps * 16 * 4;
    Ahead<F, kAhead> now, next;
    // Rows of part 1 of a gated activation's tile are those of `up`.
    int tile = first_tile, part = 0, first = warp;
    if (tile < tiles) load(now, w, tile * 16, first);
    Activations<F, kThreads, kPart, kPart, 2 * kAhead, kNorm, Data, NormVector> activations(
        norm, 0, w.k, blocks);
    await_inputs();
    activations.arrange(x, w.k, arranged, sums_of_warps);
    float sums[2] = {}, gate = 0.f;
    int buffer = 0;
    while (tile < tiles) {
      int next_tile = tile, next_part = part, next_first = first + step;
      const bool last = next_first - warp >= blocks;
      if (last) {
        next_first = warp;
        if (++next_part == kParts) next_part = 0, next_tile += stride;
      }
      if (next_tile < tiles) load(next, w, next_part * out.m + next_tile * 16, next_first);
      multiply(sums, now, arranged, first, blocks);
      if (last) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          sums[r] += __shfl_xor_sync(~0u, sums[r], 1);
          sums[r] += __shfl_xor_sync(~0u, sums[r], 2);
        }
        float* mine = sums_of_warps + (buffer * kWarps + warp) * 16;
        if (t == 0) mine[g] = sums[0], mine[g + 8] = sums[1];
        __syncthreads();
        if (threadIdx.x < 16) {
          float value = 0.f;
#pragma unroll
          for (int i = 0; i < kWarps; ++i)
            value += sums_of_warps[(buffer * kWarps + i) * 16 + threadIdx.x];
          const int row = tile * 16 + threadIdx.x, weight_row = part * out.m + row;
          value *= row_scale<F>(w, weight_row);
          if (!kGate) {
            out.store(row, 0, value);
          } else if (row < out.m) {
            if (out.bias) value += (float)out.bias[weight_row];
            if (part == 0) gate = value;
            else out.y[row] = (Data)(activate<kGate>(gate) * value);
          }
        }
        buffer ^= 1;
        sums[0] = sums[1] = 0.f;
      }
      now = next;
      tile = next_tile, part = next_part, first = next_first;
    }
  }
};

template <class F, int kWarps, int kAhead, bool kNorm, int kGate, bool kBias, bool kResidual,
          typename Data, typename Vector, typename NormVector>
__device__ __forceinline__ void gemv(const void* codes, const void* scales, const void* mins,
                                     const void* x, const void* norm, const void* bias,
                                     const void* residual, void* y, int m, int k, int chunks,
                                     int groups, float eps, float offset, int tile, int stride,
                                     void* shared) {
  const Matrix w = {codes, scales, mins, m, k, chunks, groups};
  const Norm<NormVector> of = {static_cast<const NormVector*>(norm), eps, offset};
  const Epilogue<Data, Vector> out = {kBias ? static_cast<const Vector*>(bias) : nullptr,
                                      kResidual ? static_cast<const Data*>(residual) : nullptr,
                                      static_cast<Data*>(y), kGate ? m / 2 : m, 1};
  Gemv<F, kWarps, kAhead>::template run<kNorm, kGate>(w, static_cast<const Data*>(x), of, out, tile,
                                                      stride, static_cast<char*>(shared));
}

}  // namespace llmc
#endif
