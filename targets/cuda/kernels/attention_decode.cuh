// Attention of single new tokens over their sequences' pages, on tensor cores (mma.sync m16n8k16).
//
// A block has a sequence, up to eight query heads of a K/V head and a part of the context, whose
// pages of 16 tokens its warps take in turns. Keys and values go from memory to registers: keys lie
// as 8 features of a token in 16 bytes, which are a thread's operands of two mmas once the queries'
// features stand in the same order; of values a thread takes 8 features of four tokens and pairs
// tokens itself. Softmax is online in float32 (FlashAttention-2, Dao, 2023) with powers of two.
//
// Eight of an mma's 16 rows are the heads'. The others hold what rounding took from queries and
// weights, so that products are as exact as the stored keys and values.
#ifndef LLMC_ATTENTION_DECODE
#define LLMC_ATTENTION_DECODE

namespace llmc {

// One attention: kHeads query heads share each of kKvHeads; a part of a context leaves kDv sums, its
// weights' total and its highest score for each head.
template <typename Float_, int kD_, int kDv_, int kHeads_, int kKvHeads_>
struct Heads {
  typedef Float_ Float;
  static const int kD = kD_, kDv = kDv_, kHeads = kHeads_, kKvHeads = kKvHeads_;
  static const int kTile = kHeads < 8 ? kHeads : 8;  // query heads of a block
  static const int kTiles = kHeads / kTile;
  static const int kPage = 16, kRow = kDv + 2;
};

struct Scoring {
  float scale, softcap, softcap_power;  // a softcap of 0 is none; see attention_inputs.py
  int window;                           // 0 is none
  __device__ float capped(float score) const {
    if (softcap == 0.f) return score;
    return softcap - 2.f * softcap / (exp2f(score * softcap_power) + 1.f);
  }
};

// The pages of a sequence's context that the token sees, cut into parts.
struct Context {
  int begin, end;        // positions
  int first_page, pages, share;
  __device__ Context(int length, int window, int parts, int warps) {
    end = length;
    begin = window && length > window ? length - window : 0;
    first_page = begin / 16;
    pages = (end + 15) / 16 - first_page;
    share = max((pages + parts - 1) / parts, warps);  // a page for every warp at least
  }
  __device__ int parts() const { return (pages + share - 1) / share; }
};

// Two numbers rounded, and what that took from them.
template <typename Float>
__device__ __forceinline__ u32 split(float a, float b, u32& rest) {
  Float kind;
  const u32 bits = pack(a, b, kind);
  const float2 kept = unpack(bits, kind);
  rest = pack(a - kept.x, b - kept.y, kind);
  return bits;
}

template <class H, int kWarps>
struct Decode {
  typedef typename H::Float Float;
  static const int kSteps = H::kD / 32, kChunks = H::kDv / 64;

  // What a warp knows of its pages: highest score, this thread's share of the weights' total, and
  // sums of head g (and of what was left of its weights) at features 64 c + 8 (2t + e % 2) + i.
  struct State {
    float highest, total;
    float sums[kChunks][8][4];
  };

  static __device__ __forceinline__ void page(State& state, const uint4 (&q)[2][kSteps],
                                              const uint4* keys, const uint4* values, int position,
                                              const Context& context, const Scoring& scoring) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4 k[2][kSteps], v[kChunks][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int j = 0; j < 2; ++j) k[j][s] = keys[(s * 4 + t) * H::kPage + j * 8 + g];
    // Behind the end are stale numbers, which may be no numbers: they are not read.
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 2 * t + i % 2 + i / 2 * 8;
        v[c][i] = position + token < context.end ? values[token * (H::kDv / 8) + c * 8 + g]
                                                 : make_uint4(0, 0, 0, 0);
      }
    float scores[2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sums[4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        mma(sums, q[0][s].x, q[1][s].x, q[0][s].y, q[1][s].y, k[j][s].x, k[j][s].y, Float());
        mma(sums, q[0][s].z, q[1][s].z, q[0][s].w, q[1][s].w, k[j][s].z, k[j][s].w, Float());
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = position + j * 8 + 2 * t + e;
        const bool seen = at >= context.begin && at < context.end;
        scores[j][e] = seen ? scoring.capped(sums[e] + sums[2 + e]) : kLowest;
      }
    }
    float most = fmaxf(fmaxf(scores[0][0], scores[0][1]), fmaxf(scores[1][0], scores[1][1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    most = fmaxf(most, state.highest);
    const float factor = power_of_two(state.highest - most);
    state.highest = most;
    state.total *= factor;
    u32 weights[2], rests[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // Where a warp has seen nothing, the lowest score is the highest: it still weighs nothing.
        scores[j][e] = scores[j][e] == kLowest ? 0.f : power_of_two(scores[j][e] - most);
        state.total += scores[j][e];
      }
      weights[j] = split<Float>(scores[j][0], scores[j][1], rests[j]);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float(&sums)[4] = state.sums[c][i];
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[e] *= factor;
        mma(sums, weights[0], rests[0], weights[1], rests[1], pair(v[c][0], v[c][1], i),
            pair(v[c][2], v[c][3], i), Float());
      }
  }

  // The i-th halves of two vectors.
  static __device__ __forceinline__ u32 pair(const uint4& a, const uint4& b, int i) {
    const u32 low[4] = {a.x, a.y, a.z, a.w}, high[4] = {b.x, b.y, b.z, b.w};
    return __byte_perm(low[i / 2], high[i / 2], i % 2 ? 0x7632 : 0x5410);
  }

  // Head g's features in the order of the keys: chunk 4s + t.
  template <typename Data>
  static __device__ __forceinline__ void load_query(uint4 (&q)[2][kSteps], const Data* from,
                                                    float scale, bool valid) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      u32 kept[4], rest[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Data* at = from + (s * 4 + t) * 8 + 2 * i;
        kept[i] = valid ? split<Float>((float)at[0] * scale, (float)at[1] * scale, rest[i]) : 0;
        rest[i] = valid ? rest[i] : 0;
      }
      q[0][s] = make_uint4(kept[0], kept[1], kept[2], kept[3]);
      q[1][s] = make_uint4(rest[0], rest[1], rest[2], rest[3]);
    }
  }

  static __host__ __device__ constexpr int shared_floats() {
    return kWarps * H::kTile * (H::kDv + 2);
  }

  // Has a page brought into the L2 cache.
  static __device__ __forceinline__ void prefetch(int page, const void* k_pages,
                                                  const void* v_pages, int tile) {
    const size_t at = (size_t)page * H::kKvHeads + tile / H::kTiles;
    prefetch_page<H::kD>(k_pages, at);
    prefetch_page<H::kDv>(v_pages, at);
  }
  template <int kFeatures>
  static __device__ __forceinline__ void prefetch_page(const void* pages, size_t at) {
    const int kBytes = kFeatures * H::kPage * 2;
    const char* page = static_cast<const char*>(pages) + at * kBytes;
#pragma unroll
    for (int line = 0; line < kBytes; line += 32 * 128)
      if (line + threadIdx.x % 32 * 128 < kBytes)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(page + line + threadIdx.x % 32 * 128));
  }

  template <typename Data, typename Vector>
  static __device__ __forceinline__ void run(const Data* q, const Context& context,
                                             const int* table, int first_page, const void* k_pages, const void* v_pages,
                                             const Vector* sinks, Data* out, float* partial,
                                             const Scoring& scoring, int row, int sequence,
                                             int tile, int part, int parts, float* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = part * context.share;
    if (first >= context.pages) return;
    const int count = min(context.share, context.pages - first);
    const int kv_head = tile / H::kTiles;
    const int first_head = kv_head * H::kHeads + tile % H::kTiles * H::kTile;
    uint4 queries[2][kSteps];
    load_query(queries, q + ((size_t)row * H::kKvHeads * H::kHeads + first_head + g) * H::kD,
               scoring.scale, g < H::kTile);
    State state = {kLowest, 0.f};
    for (int i = warp; i < count; i += kWarps) {
      const int number = context.first_page + first + i;
      const size_t page_number = i == warp ? first_page : table[number];
      const size_t at = page_number * H::kKvHeads + kv_head;
      page(state, queries, static_cast<const uint4*>(k_pages) + at * (H::kD * H::kPage / 8),
           static_cast<const uint4*>(v_pages) + at * (H::kDv * H::kPage / 8), number * H::kPage,
           context, scoring);
    }
    state.total += __shfl_xor_sync(~0u, state.total, 1);
    state.total += __shfl_xor_sync(~0u, state.total, 2);
    if (g < H::kTile) {
      float* mine = shared + (warp * H::kTile + g) * H::kRow;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            mine[c * 64 + (2 * t + e) * 8 + i] = state.sums[c][i][e] + state.sums[c][i][2 + e];
      if (t == 0) mine[H::kDv] = state.total, mine[H::kDv + 1] = state.highest;
    }
    __syncthreads();
    const bool whole = context.parts() == 1;
    for (int item = threadIdx.x; item < H::kTile * H::kDv; item += kWarps * 32) {
      const int head = item / H::kDv, feature = item % H::kDv, number = first_head + head;
      const Sums sums =
          merge<H::kDv>(shared + head * H::kRow, kWarps, H::kTile * H::kRow, feature);
      const size_t query = (size_t)row * H::kKvHeads * H::kHeads + number;
      if (whole) {
        out[query * H::kDv + feature] =
            (Data)sums.divided(sinks ? (float)sinks[number] * kLog2E : kLowest);
        continue;
      }
      float* to = partial +
                  (((size_t)sequence * H::kKvHeads * H::kHeads + number) * parts + part) * H::kRow;
      to[feature] = sums.value;
      if (feature == 0) to[H::kDv] = sums.total, to[H::kDv + 1] = sums.highest;
    }
  }

  static constexpr float kLowest = -3.0e38f, kLog2E = 1.44269504f;

  struct Sums {
    float value, total, highest;
    // A sink joins the softmax and is dropped.
    __device__ float divided(float sink) const {
      const float above = fmaxf(highest, sink), factor = power_of_two(highest - above);
      return value * factor / (total * factor + power_of_two(sink - above));
    }
  };

  // One feature of `count` rows of sums, totals and highest scores, `stride` floats apart.
  template <int kDv>
  static __device__ __forceinline__ Sums merge(const float* from, int count, int stride,
                                               int feature) {
    float highest = kLowest;
    for (int i = 0; i < count; ++i) highest = fmaxf(highest, from[i * stride + kDv + 1]);
    Sums sums = {0.f, 0.f, highest};
    for (int i = 0; i < count; ++i) {
      const float factor = power_of_two(from[i * stride + kDv + 1] - highest);
      sums.value += from[i * stride + feature] * factor;
      sums.total += from[i * stride + kDv] * factor;
    }
    return sums;
  }

  // The same of the parts of a context, at most 32, by whole warps: each part's total and highest
  // score are a thread's, and no load waits for another.
  template <int kDv>
  static __device__ __forceinline__ Sums merge_all(const float* from, int count, int feature) {
    const int lane = threadIdx.x % 32;
    const float* mine = from + lane * H::kRow + kDv;
    const float total = lane < count ? mine[0] : 0.f, own = lane < count ? mine[1] : kLowest;
    float highest = own;
#pragma unroll
    for (int other = 16; other; other /= 2)
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, other));
    const float factor = lane < count ? power_of_two(own - highest) : 0.f;
    Sums sums = {0.f, total * factor, highest};
#pragma unroll
    for (int other = 16; other; other /= 2)
      sums.total += __shfl_xor_sync(~0u, sums.total, other);
    for (int first = 0; first < count; first += 8) {
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        values[i] = first + i < count ? from[(first + i) * H::kRow + feature] : 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        sums.value += values[i] * __shfl_sync(~0u, factor, (first + i) % 32);
    }
    return sums;
  }
};

// A sequence's place among the step's rows; -1 where it has not just one new token.
__device__ __forceinline__ int decode_row(const int* q_starts, int sequence) {
  return q_starts[sequence + 1] - q_starts[sequence] == 1 ? q_starts[sequence] : -1;
}

template <class H, int kWarps, bool kSinks, typename Data, typename Vector>
__device__ __forceinline__ void attend_one(const void* q, const void* q_starts, const void* kv_lens,
                                       const void* tables, const void* k_pages,
                                       const void* v_pages, const void* sinks, void* out,
                                       void* partial, float scale, float softcap,
                                       float softcap_power, int window, int group, int sequences,
                                       int blocks, int sequence, int tile, int part, int parts,
                                       void* shared) {
  // A step's inputs were there before its first launch, and so were all pages but the new token's.
  const int row = decode_row(static_cast<const int*>(q_starts), sequence);
  const int* table = static_cast<const int*>(tables) + ((size_t)group * sequences + sequence) * blocks;
  const Context context(row < 0 ? 0 : static_cast<const int*>(kv_lens)[sequence], window, parts,
                        kWarps);
  const int number = part * context.share + threadIdx.x / 32;  // of this warp's first page
  const int page = number < context.pages ? table[context.first_page + number] : 0;
  if (number < context.pages) Decode<H, kWarps>::prefetch(page, k_pages, v_pages, tile);
  await_inputs();
  if (row < 0) return;
  const Scoring scoring = {scale, softcap, softcap_power, window};
  Decode<H, kWarps>::run(
      static_cast<const Data*>(q), context, table, page, k_pages, v_pages,
      kSinks ? static_cast<const Vector*>(sinks) : nullptr, static_cast<Data*>(out),
      static_cast<float*>(partial), scoring, row, sequence, tile, part, parts,
      static_cast<float*>(shared));
}

// Brings the parts of a head's context together; a thread a feature.
template <class H, int kWarps, bool kSinks, typename Data, typename Vector>
__device__ __forceinline__ void merge_parts(const void* q_starts, const void* kv_lens,
                                            const void* sinks, void* out, const void* partial,
                                            int window, int sequence, int head, int parts) {
  typedef Decode<H, kWarps> D;
  const int row = decode_row(static_cast<const int*>(q_starts), sequence);
  const Context context(static_cast<const int*>(kv_lens)[sequence], window, parts, kWarps);
  // The launch behind starts when this one has ended: its blocks, of which one is meant for each
  // multiprocessor, would go two by two to those that have none of these.
  await_launch();
  if (row < 0 || context.parts() == 1) return;
  const size_t heads = H::kKvHeads * H::kHeads;
  const float* from =
      static_cast<const float*>(partial) + ((size_t)sequence * heads + head) * parts * H::kRow;
  const typename D::Sums sums = D::template merge_all<H::kDv>(from, context.parts(), threadIdx.x);
  const float sink = kSinks ? (float)static_cast<const Vector*>(sinks)[head] * D::kLog2E : D::kLowest;
  static_cast<Data*>(out)[((size_t)row * heads + head) * H::kDv + threadIdx.x] =
      (Data)sums.divided(sink);
}

}  // namespace llmc
#endif
