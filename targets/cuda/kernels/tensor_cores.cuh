// Products y[T, M] = x[T, K] * w[M, K]^T on tensor cores (mma.sync m16n8k16, sm_80 and newer).
//
// Weights lie in layout chunk32 (targets/gpu/layout.py): a chunk is 16 bytes of one row. Four chunks
// that follow each other in a row make a superblock; thread t of a quad owns chunk t of it, and each
// step of 8 features of the four chunks is a slab of 32 features. An mma sums over its features in
// any order, so weights and activations only have to agree: thread t holds features 8s ... 8s + 7 of
// chunk t for slab s, which are the pairs of columns (2t, 2t + 8) of two mmas. So a fragment is one
// 16-byte load, for weights of 16, 8 and 4 bits and for activations alike, with no ldmatrix.
//
// Activations are put into that order first, as Float: x16[slabs][4 chunks][padded tokens][8].
//
// On Hopper (sm_90a) tiles of 16-bit weights go to wgmma instead: eight rows of a chunk are just one
// of the core matrices that it reads from shared memory, and so are eight tokens of x16.
#ifndef LLMC_TENSOR_CORES
#define LLMC_TENSOR_CORES

namespace llmc {

// How a weight is stored; group 0 is a scale for the whole row, applied to the sums.
template <typename Float_, int kBits_, bool kSigned_, int kZero_, typename Scale_, int kGroup_,
          bool kMin_, bool kFloatCodes_ = false>
struct Format {
  typedef Float_ Float;
  typedef Scale_ Scale;
  static const int kBits = kBits_, kZero = kZero_, kGroup = kGroup_;
  static const bool kSigned = kSigned_, kMin = kMin_, kFloatCodes = kFloatCodes_;
  static const bool kScaled = kBits < 16 && kGroup > 0;
  static const bool kRowScale = kBits < 16 && kGroup == 0;
  static const int kChunk = 128 / kBits;  // features
  static const int kSlabs = kChunk / 8;
  static const int kBlock = 4 * kChunk;  // features of a superblock
  // Scales of a superblock, or superblocks of a scale.
  static const int kScales = !kScaled ? 0 : kGroup >= kBlock ? 1 : kBlock / (kGroup ? kGroup : 1);
  static const int kBlocksPerScale = kScaled && kGroup > kBlock ? kGroup / kBlock : 1;
  // Scales that the chunk of one thread needs: one, or two for groups of 16 in a chunk of 32.
  static const int kChunkScales = kScales > 4 ? kScales / 4 : 1;
};

// The matrix: M rows of K features, its codes and what scales them.
struct Matrix {
  const void* codes;
  const void* scales;
  const void* mins;
  int m, k, chunks, groups;  // groups: scales stored for a row
  __device__ int panels() const { return (m + 31) / 32; }
};

// bias[M] and residual[T, M] may be null; sums become y = sum + bias + residual.
template <typename Data, typename Vector>
struct Epilogue {
  const Vector* bias;
  const Data* residual;
  Data* y;
  int m, tokens;
  __device__ void store(int row, int token, float value) const {
    if (row >= m || token >= tokens) return;
    const size_t at = (size_t)token * m + row;
    if (bias) value += (float)bias[row];
    if (residual) value += (float)residual[at];
    y[at] = (Data)value;
  }
};

__device__ __forceinline__ __half2 as_half2(u32 bits) { return *reinterpret_cast<__half2*>(&bits); }
__device__ __forceinline__ u32 as_bits(__half2 h) { return *reinterpret_cast<u32*>(&h); }

// What turns a thread's codes into weights.
template <class F>
struct Scales {
  __half2 scale[F::kChunkScales];
  __half2 min[F::kChunkScales];
};

// A code above its zero times its scale, plus its minimum: rounded once, since codes are exact.
template <class F>
__device__ __forceinline__ u32 weigh(__half2 code, const Scales<F>& s, int slab) {
  if (!F::kScaled) return as_bits(code);
  const int part = slab * F::kChunkScales / F::kSlabs;
  return as_bits(F::kMin ? __hfma2(code, s.scale[part], s.min[part])
                         : __hmul2(code, s.scale[part]));
}

// Two e4m3 numbers, of the lower half of `pair`, as float16.
__device__ __forceinline__ u32 decode_e4m3(u32 pair) {
#if __CUDA_ARCH__ >= 890
  u32 both;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"((unsigned short)pair));
  return both;
#else
  // With its bits at the float16's, whose exponent's bias is 8 more.
  const u32 up = __byte_perm(pair, 0, 0x1404);
  const u32 bits = (up & 0x80008000u) | (up & 0x7f007f00u) >> 1;
  return as_bits(__hmul2(as_half2(bits), __float2half2_rn(256.f)));
#endif
}

// (word & mask) | bits in one instruction: of two constants the compiler makes two.
template <u32 kMask, u32 kBits>
__device__ __forceinline__ u32 select_bits(u32 word) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "n"(kMask), "r"(kBits));
  return out;
}

// The 8 weights of a slab that a chunk holds, as four pairs. Or-ed into the mantissa of 1024, a code
// becomes a float16 without a conversion.
template <class F>
__device__ __forceinline__ void decode(const uint4& chunk, const Scales<F>& s, int slab,
                                       u32 (&out)[4]) {
  const u32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  if (F::kBits == 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = words[i];
  } else if (F::kFloatCodes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = decode_e4m3(words[2 * slab + i / 2] >> (i % 2 * 16));
  } else if (F::kBits == 8) {
    const __half2 base = __float2half2_rn(F::kSigned ? 1152.f : 1024.f);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 w = words[2 * slab + i] ^ (F::kSigned ? 0x80808080u : 0u);
      out[2 * i] = weigh<F>(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4140)), base), s, slab);
      out[2 * i + 1] =
          weigh<F>(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4342)), base), s, slab);
    }
  } else {
    const __half2 low = __float2half2_rn(1024.f + F::kZero);
    const __half2 high = __float2half2_rn(-64.f - F::kZero), sixteenth = __float2half2_rn(0.0625f);
    const u32 w = words[slab];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 byte = w >> (8 * i), lows = select_bits<0x000f000fu, 0x64006400u>(byte),
                highs = select_bits<0x00f000f0u, 0x64006400u>(byte);
      out[2 * i] = weigh<F>(__hsub2(as_half2(lows), low), s, slab);
      out[2 * i + 1] = weigh<F>(__hfma2(as_half2(highs), sixteenth, high), s, slab);
    }
  }
}

// The scale of chunk `t` of a superblock whose first scale is the first of `scales`.
template <class F>
__device__ __forceinline__ int scale_of(int t, int part) {
  return F::kScales >= 4 ? t * (F::kScales / 4) + part : t * F::kScales / 4;
}

__device__ __forceinline__ __half2 to_half2(half h) { return __half2half2(h); }
__device__ __forceinline__ __half2 to_half2(float f) { return __float2half2_rn(f); }

// Both rows of an m16 tile times a slab of the tokens' activations.
template <class F, int kTokenTiles>
__device__ __forceinline__ void multiply(float (&sums)[kTokenTiles][4], const u32 (&a)[4],
                                         const u32 (&b)[4], const uint4 (&x)[kTokenTiles]) {
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j)
    mma(sums[j], a[0], b[0], a[1], b[1], x[j].x, x[j].y, typename F::Float());
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j)
    mma(sums[j], a[2], b[2], a[3], b[3], x[j].z, x[j].w, typename F::Float());
}

// The scale of a row's sums.
template <class F>
__device__ __forceinline__ float row_scale(const Matrix& w, int row) {
  if (!F::kRowScale || row >= w.m) return 1.f;
  return (float)static_cast<const typename F::Scale*>(w.scales)[row];
}

// x[tokens, K] into x16[slab][padded][4][8]; block (slab, part of the tokens) of 256 threads.
template <class F, typename Data>
__device__ __forceinline__ void arrange(const Data* x, void* x16, int k, int tokens, int padded,
                                        int slab, int part) {
  const int item = part * 256 + threadIdx.x, token = item % padded, t = item / padded;
  if (t >= 4) return;
  const int feature = slab / F::kSlabs * F::kBlock + t * F::kChunk + slab % F::kSlabs * 8;
  float values[8];
  const Data* from = x + (size_t)token * k + feature;
  if (k % 8 == 0 && token < tokens && feature < k) {
    uint4 raw[sizeof(Data) / 2];
#pragma unroll
    for (int i = 0; i < sizeof(Data) / 2; ++i) raw[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = (float)reinterpret_cast<const Data*>(raw)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      values[i] = token < tokens && feature + i < k ? (float)from[i] : 0.f;
  }
  typename F::Float kind;
  const uint4 out = {pack(values[0], values[1], kind), pack(values[2], values[3], kind),
                     pack(values[4], values[5], kind), pack(values[6], values[7], kind)};
  static_cast<uint4*>(x16)[((size_t)slab * 4 + t) * padded + token] = out;
}

// Few tokens: a block makes 32 rows of kTokens tokens, its warps share the superblocks, every
// operand goes from memory to registers: each weight is read once and by one thread.
template <class F, int kTokens, int kWarps, int kAhead, typename Data, typename Vector>
__device__ __forceinline__ void few(const Matrix& w, const void* x16, int padded,
                                    const Epilogue<Data, Vector>& out, int panel, int tile,
                                    float* shared) {
  const int kTiles = kTokens / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int blocks = (w.chunks + 3) / 4;
  const uint4* codes = static_cast<const uint4*>(w.codes) + (size_t)panel * w.chunks * 32;
  const typename F::Scale* scales =
      static_cast<const typename F::Scale*>(w.scales) + (size_t)panel * w.groups * 32;
  const typename F::Scale* mins =
      static_cast<const typename F::Scale*>(w.mins) + (size_t)panel * w.groups * 32;
  const uint4* x = static_cast<const uint4*>(x16) + (size_t)tile * kTokens;
  float sums[2][kTiles][4] = {};
  for (int first = warp; first < blocks; first += kWarps * kAhead) {
    uint4 raw[kAhead][4];
    Scales<F> s[kAhead][4];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int block = first + u * kWarps, chunk = block * 4 + t;
      const bool valid = chunk < w.chunks;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        raw[u][r] = valid ? __ldcs(codes + (size_t)chunk * 32 + r * 8 + g) : make_uint4(0, 0, 0, 0);
        if (F::kScaled) {
#pragma unroll
          for (int part = 0; part < F::kChunkScales; ++part) {
            const int group =
                block * F::kScales / F::kBlocksPerScale + scale_of<F>(t, part);
            const size_t at = (size_t)group * 32 + r * 8 + g;
            s[u][r].scale[part] = to_half2(valid ? scales[at] : (typename F::Scale)0.f);
            if (F::kMin) s[u][r].min[part] = to_half2(valid ? mins[at] : (typename F::Scale)0.f);
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int block = first + u * kWarps;
      if (block >= blocks) break;
#pragma unroll
      for (int slab = 0; slab < F::kSlabs; ++slab) {
        uint4 tokens[kTiles];
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          tokens[j] = x[((size_t)(block * F::kSlabs + slab) * 4 + t) * padded + j * 8 + g];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          u32 a[4], b[4];
          decode<F>(raw[u][2 * i], s[u][2 * i], slab, a);
          decode<F>(raw[u][2 * i + 1], s[u][2 * i + 1], slab, b);
          multiply<F, kTiles>(sums[i], a, b, tokens);
        }
      }
    }
  }
  // The upper half of the warps hands its sums to the lower, whose sums everybody adds up.
  const int kHalf = kWarps / 2;
  float* mine = shared + warp % kHalf * (kTokens * 32);
#pragma unroll
  for (int round = 0; round < 2; ++round) {
    if (warp / kHalf == 1 - round) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float* at = mine + (j * 8 + t * 2 + e % 2) * 32 + i * 16 + e / 2 * 8 + g;
            *at = sums[i][j][e] + (round ? *at : 0.f);
          }
    }
    __syncthreads();
  }
  for (int item = threadIdx.x; item < kTokens * 32; item += kWarps * 32) {
    float total = 0.f;
#pragma unroll
    for (int part = 0; part < kHalf; ++part) total += shared[part * (kTokens * 32) + item];
    const int row = panel * 32 + item % 32;
    out.store(row, tile * kTokens + item / 32, total * row_scale<F>(w, row));
  }
}

// Many tokens: a tile of kRows by kTokens a block, of kWarpRows by kWarpTokens a warp, kDepth
// superblocks of it at a time in one of kStages parts of shared memory, filled in the background.
template <class F, int kRows, int kTokens, int kWarpRows, int kWarpTokens, int kDepth, int kStages>
struct Tile {
  static const int kThreads = kRows / kWarpRows * (kTokens / kWarpTokens) * 32;
  static const int kCodeBytes = kDepth * 4 * kRows * 16;
  static const int kTokenBytes = kDepth * F::kSlabs * kTokens * 64;
  // A row of scales is longer than it has to be, so that the quad's reads meet in no bank.
  static const int kScaleBytes = kRows * (int)sizeof(typename F::Scale) + 32;
  static const int kAllScales = kDepth * F::kScales * kScaleBytes;
  static const int kStageBytes = kCodeBytes + kTokenBytes + kAllScales * (F::kMin ? 2 : 1);
  static const int kBytes = kStageBytes * kStages;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static const bool kGroups = F::kBits == 16 && kWarpRows == 64 && kWarpTokens == 32 && kTokens == 128;
#else
  static const bool kGroups = false;
#endif

  // Where a row of chunk c lies: quads read four chunks of a row, which have to be in different
  // banks. Groups of warps read eight rows of a chunk.
  static __device__ __forceinline__ int place(int row, int c) {
    return kGroups ? row : row ^ (c % 4 * 2);
  }

  static __device__ __forceinline__ void load_scales(const void* from, char* to, const Matrix& w,
                                                     int first_row, int step) {
    const int kPieces = 2 * sizeof(typename F::Scale);  // of 16 bytes, of a panel's scales
    const int kTotal = kDepth * F::kScales * (kRows / 32) * kPieces;
    for (int item = threadIdx.x; item < kTotal; item += kThreads) {
      const int piece = item % kPieces, panel = item / kPieces % (kRows / 32);
      const int part = item / (kPieces * (kRows / 32));
      const int group = F::kBlocksPerScale > 1
                            ? (step * kDepth + part) / F::kBlocksPerScale
                            : step * kDepth * F::kScales + part;
      const int from_panel = first_row / 32 + panel;
      const bool valid = from_panel < w.panels() && group < w.groups;
      const size_t at = valid ? ((size_t)from_panel * w.groups + group) * kPieces + piece : 0;
      copy16(to + part * kScaleBytes + (panel * kPieces + piece) * 16,
             static_cast<const uint4*>(from) + at, valid);
    }
  }

  static __device__ __forceinline__ void load(const Matrix& w, const void* x16, int padded,
                                              int first_row, int first_token, int step,
                                              char* stage) {
#pragma unroll
    for (int i = 0; i < kDepth * 4 * kRows / kThreads; ++i) {
      const int item = i * kThreads + threadIdx.x, row = item % kRows, c = item / kRows;
      const int chunk = step * kDepth * 4 + c, panel = (first_row + row) / 32;
      const bool valid = chunk < w.chunks && panel < w.panels();
      const size_t at = valid ? ((size_t)panel * w.chunks + chunk) * 32 + row % 32 : 0;
      copy16(stage + (c * kRows + place(row, c)) * 16,
             static_cast<const uint4*>(w.codes) + at, valid);
    }
    char* tokens = stage + kCodeBytes;
#pragma unroll
    for (int i = 0; i < kDepth * F::kSlabs * kTokens * 4 / kThreads; ++i) {
      const int item = i * kThreads + threadIdx.x;
      const int token = item % kTokens, c = item / kTokens;
      const size_t at = (size_t)(step * kDepth * F::kSlabs * 4 + c) * padded + first_token + token;
      copy16(tokens + (c * kTokens + place(token, c)) * 16, static_cast<const uint4*>(x16) + at,
             true);
    }
    if (F::kScaled) load_scales(w.scales, tokens + kTokenBytes, w, first_row, step);
    if (F::kMin) load_scales(w.mins, tokens + kTokenBytes + kAllScales, w, first_row, step);
  }

  static __device__ __forceinline__ Scales<F> scales_at(const char* scales, int block, int row,
                                                        int t) {
    Scales<F> s;
#pragma unroll
    for (int part = 0; part < F::kChunkScales; ++part) {
      const char* at = scales + (block * F::kScales + scale_of<F>(t, part)) * kScaleBytes;
      s.scale[part] = to_half2(reinterpret_cast<const typename F::Scale*>(at)[row]);
      if (F::kMin)
        s.min[part] = to_half2(reinterpret_cast<const typename F::Scale*>(at + kAllScales)[row]);
    }
    return s;
  }

  static const int kRowTiles = kWarpRows / 16, kTokenTiles = kWarpTokens / 8;

  static __device__ __forceinline__ void multiply_stage(
      float (&sums)[kRowTiles][kTokenTiles][4], const char* stage, int warp_row, int warp_token) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const char* tokens = stage + kCodeBytes;
#pragma unroll
    for (int block = 0; block < kDepth; ++block) {
      uint4 raw[kRowTiles * 2];
      Scales<F> s[kRowTiles * 2];
#pragma unroll
      for (int r = 0; r < kRowTiles * 2; ++r) {
        const int row = warp_row + r * 8 + g;
        raw[r] = *reinterpret_cast<const uint4*>(
            stage + ((block * 4 + t) * kRows + place(row, t)) * 16);
        if (F::kScaled) s[r] = scales_at(tokens + kTokenBytes, block, row, t);
      }
#pragma unroll
      for (int slab = 0; slab < F::kSlabs; ++slab) {
        uint4 x[kTokenTiles];
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j)
          x[j] = *reinterpret_cast<const uint4*>(
              tokens + (((block * F::kSlabs + slab) * 4 + t) * kTokens +
                        place(warp_token + j * 8 + g, t)) * 16);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          u32 a[4], b[4];
          decode<F>(raw[2 * i], s[2 * i], slab, a);
          decode<F>(raw[2 * i + 1], s[2 * i + 1], slab, b);
          multiply<F, kTokenTiles>(sums[i], a, b, x);
        }
      }
    }
  }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // 128 threads make 64 rows of all tokens; the products of a step run while the next is awaited.
  template <typename Data, typename Vector>
  static __device__ __forceinline__ void run_groups(const Matrix& w, const void* x16, int padded,
                                                    const Epilogue<Data, Vector>& out,
                                                    int first_row, int first_token, char* shared) {
    const int steps = (w.chunks + 4 * kDepth - 1) / (4 * kDepth), group = threadIdx.x / 128;
    float sums[16][4] = {};
#pragma unroll
    for (int i = 0; i < kStages - kLag; ++i) {
      if (i < steps) load(w, x16, padded, first_row, first_token, i, shared + i * kStageBytes);
      commit();
    }
    int read = 0, write = kStages - kLag;
    for (int step = 0; step < steps; ++step) {
      wait<kStages - kLag - 1>();
      publish();
      __syncthreads();
      const char* stage = shared + read * kStageBytes;
      begin_groups();
#pragma unroll
      for (int c = 0; c < kDepth * 4; c += 2)
        multiply_group(sums, describe(stage + (c * kRows + group * 64) * 16, kRows * 16, 128),
                       describe(stage + kCodeBytes + c * kTokens * 16, kTokens * 16, 128),
                       typename F::Float());
      commit_groups();
      const int next = step + kStages - kLag;
      if (next < steps)
        load(w, x16, padded, first_row, first_token, next, shared + write * kStageBytes);
      commit();
      wait_groups<kLag - 1>();
      read = read + 1 == kStages ? 0 : read + 1;
      write = write + 1 == kStages ? 0 : write + 1;
    }
    wait_groups<0>();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row = first_row + threadIdx.x / 32 * 16 + g;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      out.store(row + i / 2 % 2 * 8, first_token + i / 4 * 8 + t * 2 + i % 2, sums[i / 4][i % 4]);
  }
#endif

  // Steps that a stage stays in use after its own: the products of the last one may still run.
  static const int kLag = kStages > 2 ? 2 : 1;

  template <typename Data, typename Vector>
  static __device__ __forceinline__ void run(const Matrix& w, const void* x16, int padded,
                                             const Epilogue<Data, Vector>& out, int row_tile,
                                             int token_tile, char* shared) {
    const int first_row = row_tile * kRows, first_token = token_tile * kTokens;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (kGroups) {
      run_groups(w, x16, padded, out, first_row, first_token, shared);
      return;
    }
#endif
    const int warp = threadIdx.x / 32, kAcross = kRows / kWarpRows;
    const int warp_row = warp % kAcross * kWarpRows, warp_token = warp / kAcross * kWarpTokens;
    const int steps = (w.chunks + 4 * kDepth - 1) / (4 * kDepth);
    float sums[kRowTiles][kTokenTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < steps) load(w, x16, padded, first_row, first_token, i, shared + i * kStageBytes);
      commit();
    }
    int read = 0, write = kStages - 1;
    for (int step = 0; step < steps; ++step) {
      wait<kStages - 2>();
      __syncthreads();
      const int next = step + kStages - 1;
      if (next < steps)
        load(w, x16, padded, first_row, first_token, next, shared + write * kStageBytes);
      commit();
      multiply_stage(sums, shared + read * kStageBytes, warp_row, warp_token);
      read = read + 1 == kStages ? 0 : read + 1;
      write = write + 1 == kStages ? 0 : write + 1;
    }
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half_tile = 0; half_tile < 2; ++half_tile) {
        const int row = first_row + warp_row + i * 16 + half_tile * 8 + g;
        const float scale = row_scale<F>(w, row);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            out.store(row, first_token + warp_token + j * 8 + t * 2 + e,
                      sums[i][j][half_tile * 2 + e] * scale);
      }
  }
};

// What a kernel is called with, in the order of its arguments.
struct Operands {
  const void *codes, *scales, *mins, *x16, *bias, *residual;
  void* y;
  int m, k, chunks, groups, tokens, padded;

  __device__ Matrix matrix() const { return {codes, scales, mins, m, k, chunks, groups}; }
  template <bool kBias, bool kResidual, typename Data, typename Vector>
  __device__ Epilogue<Data, Vector> epilogue() const {
    return {kBias ? static_cast<const Vector*>(bias) : nullptr,
            kResidual ? static_cast<const Data*>(residual) : nullptr, static_cast<Data*>(y), m,
            tokens};
  }
};

template <class F, typename Data>
__device__ __forceinline__ void arrange_activations(const void* x, void* x16, int k, int tokens,
                                                    int padded, int slab, int part) {
  arrange<F, Data>(static_cast<const Data*>(x), x16, k, tokens, padded, slab, part);
}

template <class F, bool kBias, bool kResidual, typename Data, typename Vector, int kTokens,
          int kWarps, int kAhead>
__device__ __forceinline__ void multiply_few(const void* codes, const void* scales,
                                             const void* mins, const void* x16, const void* bias,
                                             const void* residual, void* y, int m, int k,
                                             int chunks, int groups, int tokens, int padded,
                                             int panel, int tile, void* shared) {
  const Operands o = {codes, scales, mins,   x16,    bias,   residual, y,
                      m,     k,      chunks, groups, tokens, padded};
  few<F, kTokens, kWarps, kAhead>(o.matrix(), x16, padded,
                                  o.epilogue<kBias, kResidual, Data, Vector>(), panel, tile,
                                  static_cast<float*>(shared));
}

template <class F, bool kBias, bool kResidual, typename Data, typename Vector, class T>
__device__ __forceinline__ void multiply_tile(const void* codes, const void* scales,
                                              const void* mins, const void* x16, const void* bias,
                                              const void* residual, void* y, int m, int k,
                                              int chunks, int groups, int tokens, int padded,
                                              int row_tile, int token_tile, void* shared) {
  const Operands o = {codes, scales, mins,   x16,    bias,   residual, y,
                      m,     k,      chunks, groups, tokens, padded};
  T::run(o.matrix(), x16, padded, o.epilogue<kBias, kResidual, Data, Vector>(), row_tile,
         token_tile, static_cast<char*>(shared));
}

}  // namespace llmc
#endif
