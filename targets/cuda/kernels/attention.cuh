// Attention of several new tokens of a sequence over its pages, on tensor cores: mma.sync m16n8k16,
// and wgmma on Hopper.
//
// A tile's rows are a K/V head's new tokens times the query heads that share it (token-major), so
// that keys and values are read once for all of them. The block walks the context kPositions at a
// time: scores, online softmax in float32 (FlashAttention-2, Dao, 2023) with powers of two, weighted
// values. Scores, weights and sums never leave the registers of their warp: the sums of one mma are
// the left operand of the next.
//
// Queries, keys and values lie in shared memory alike: chunk by chunk of 8 features, in a chunk 16
// bytes a row. Pages of keys have that order already (targets/gpu/kernels/kv_pages.py). Eight rows
// of a chunk are what ldmatrix takes; 16 bytes between chunks keep copies of a row in all banks.
#ifndef LLMC_ATTENTION
#define LLMC_ATTENTION

namespace llmc {

// Four matrices of eight rows of 16 bytes; lane i says where row i % 8 of matrix i / 8 is.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], const char* row) {
  const u32 at = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at));
}
__device__ __forceinline__ void load_transposed(u32 (&to)[4], const char* row) {
  const u32 at = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at));
}

// What a quad's threads hold of a row.
__device__ __forceinline__ float largest_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// A step's sequences and where their keys and values are.
struct Batch {
  const int *q_starts, *kv_lens, *tables;  // tables: of the attention's group, [sequences, columns]
  const void *k_pages, *v_pages;
  int sequences, columns;
};

__device__ const float kLog2e = 1.4426950408889634f;

// What becomes of the products of queries and keys; softcap and window are 0 where there are none.
struct Rule {
  float scale, softcap;
  int window;
  // What makes a score a power of two.
  __device__ __forceinline__ float unit() const {
    return softcap != 0.f ? kLog2e : scale * kLog2e;
  }
};

struct TileOfBatch {
  int sequence, tile;  // -1: there are fewer
};

// The tile number `tile` of the sequences with several new tokens; kHeads * new rows each.
template <int kHeads, int kRows>
__device__ __forceinline__ TileOfBatch find_tile(const Batch& batch, int tile) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < batch.sequences; first += 32) {
    int tiles = 0;
    if (first + lane < batch.sequences) {
      const int tokens = batch.q_starts[first + lane + 1] - batch.q_starts[first + lane];
      tiles = tokens > 1 ? (tokens * kHeads + kRows - 1) / kRows : 0;
    }
    int until = tiles;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, until, d);
      if (lane >= d) until += below;
    }
    const u32 behind = __ballot_sync(0xffffffffu, tile < until);
    if (behind) {
      const int owner = __ffs(behind) - 1;
      return {first + owner, tile - __shfl_sync(0xffffffffu, until - tiles, owner)};
    }
    tile -= __shfl_sync(0xffffffffu, until, 31);
  }
  return {-1, 0};
}

// kD features of keys and kDv of values, kHeads query heads to each of kKvHeads; 16 rows a warp. On
// Hopper (sm_90a) groups of four warps take wgmma, kGroupPositions at a time.
template <typename Float_, int kD, int kDv, int kHeads, int kKvHeads, int kPage, int kWarps,
          int kPositions, int kStages, int kGroupPositions>
struct Attention {
  typedef Float_ Float;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static const bool kGroups = true;
#else
  static const bool kGroups = false;
#endif
  static const int kThreads = 32 * kWarps, kWarpRows = 16, kRows = kWarps * kWarpRows;
  static const int kBlock = kGroups ? kGroupPositions : kPositions;
  static const int kGroupHeads = kHeads, kPages = kBlock / kPage;
  static const int kSteps = kD / 16, kTiles = kBlock / 8, kColumns = kDv / 8;
  // From a chunk to the next.
  static const int kQueryStride = (kRows + 1) * 16, kStride = (kBlock + 1) * 16;
  static const int kQueryBytes = kD / 8 * kQueryStride;
  static const int kKeyBytes = kD / 8 * kStride, kValueBytes = kDv / 8 * kStride;
  static const int kStageBytes = kKeyBytes + kValueBytes;
  static const int kTables = kGroups ? 3 : kStages;  // blocks whose pages are known
  static const int kTableBytes = (kTables * kPages * 4 + 15) / 16 * 16;
  typedef float Scores[kTiles][4];
  typedef float Sums[kColumns][4];

  // The block's part of the batch.
  const Batch& batch;
  const Rule& rule;
  int sequence, kv_head;
  int first, total;  // row of the sequence that the tile begins with, and how many there are
  int base;          // position of the sequence's first new token
  int start, end;    // positions that the tile sees, from the begin of a page
  int steps;
  int warp_row;                     // of the tile, that the warp begins with
  int row_position, last_position;  // of the warp's first and last row

  // A row's highest score and, of what the thread has seen, the weights' sum.
  struct Softmax {
    float highest[2], totals[2];
  };

  __device__ __forceinline__ Attention(const Batch& b, const Rule& r, const TileOfBatch& found,
                                       int head)
      : batch(b), rule(r), sequence(found.sequence), kv_head(head), first(found.tile * kRows) {
    const int tokens = b.q_starts[sequence + 1] - b.q_starts[sequence];
    total = tokens * kHeads;
    base = b.kv_lens[sequence] - tokens;
    end = base + (min(first + kRows, total) - 1) / kHeads + 1;
    start = r.window ? max(base + first / kHeads - r.window + 1, 0) / kPage * kPage : 0;
    steps = (end - start + kBlock - 1) / kBlock;
    warp_row = threadIdx.x / 32 * kWarpRows;
    row_position = base + (first + warp_row) / kHeads;
    last_position = base + (first + warp_row + kWarpRows - 1) / kHeads;
  }

  // Page number `i` from `start` on; where there is none, one that is safe to name.
  __device__ __forceinline__ int page(int i) const {
    const int number = start / kPage + i;
    return number * kPage < end ? batch.tables[(size_t)sequence * batch.columns + number] : 0;
  }

  // Copies a block of keys or values; zeros for what lies past the end.
  __device__ __forceinline__ void load_keys(int step, const int* pages, char* to) const {
    if (step < steps) copy<kD, true>(static_cast<const uint4*>(batch.k_pages), step, pages, to);
  }
  __device__ __forceinline__ void load_values(int step, const int* pages, char* to) const {
    if (step < steps) copy<kDv, false>(static_cast<const uint4*>(batch.v_pages), step, pages, to);
  }

  template <int kFeatures, bool kKeys>
  __device__ __forceinline__ void copy(const uint4* all, int step, const int* pages,
                                       char* to) const {
    const int kChunks = kFeatures / 8, kOfPage = kPage * kChunks, kItems = kPages * kOfPage;
    const int from = start + step * kBlock;
#pragma unroll
    for (int i = 0; i < (kItems + kThreads - 1) / kThreads; ++i) {
      const int item = i * kThreads + threadIdx.x;
      if (kItems % kThreads && item >= kItems) break;
      const int number = item / kOfPage, piece = item % kOfPage;
      const int chunk = kKeys ? piece / kPage : piece % kChunks;
      const int row = number * kPage + (kKeys ? piece % kPage : piece / kChunks);
      const uint4* at = all + ((size_t)pages[number] * kKvHeads + kv_head) * kOfPage + piece;
      copy16(to + chunk * kStride + row * 16, at, from + row < end);
    }
  }

  // Eight features of a query as they are multiplied; rows past the last repeat it.
  template <typename Data>
  __device__ __forceinline__ const Data* query(const Data* q, int row) const {
    const int mine = min(first + row, total - 1);
    const int token = batch.q_starts[sequence] + mine / kHeads;
    return q + ((size_t)token * kKvHeads * kHeads + kv_head * kHeads + mine % kHeads) * kD;
  }

  template <typename Data>
  __device__ __forceinline__ void share_queries(const Data* q, char* queries) const {
    for (int item = threadIdx.x; item < kRows * (kD / 8); item += kThreads) {
      const int row = item / (kD / 8), chunk = item % (kD / 8);
      const Data* from = query(q, row) + chunk * 8;
      u32 packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed[i] = pack((float)from[2 * i], (float)from[2 * i + 1], Float());
      *reinterpret_cast<uint4*>(queries + chunk * kQueryStride + row * 16) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }

  // scores[position] += queries * keys, of the warp's rows.
  __device__ __forceinline__ void score(Scores& scores, const char* queries,
                                        const char* keys) const {
    const int lane = threadIdx.x % 32;
    // Keys: matrices are 8 positions by 8 features, features first, then positions.
    const char* key = keys + lane / 8 % 2 * kStride + (lane / 16 * 8 + lane % 8) * 16;
    const char* row = queries + lane / 16 * kQueryStride + (warp_row + lane % 16) * 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      u32 a[4];
      load_matrices(a, row + 2 * k * kQueryStride);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        u32 b[4];
        load_matrices(b, key + 2 * k * kStride + j * 128);
        mma(scores[j], a[0], a[1], a[2], a[3], b[0], b[1], Float());
        mma(scores[j + 1], a[0], a[1], a[2], a[3], b[2], b[3], Float());
      }
    }
  }

  // sums[feature] += weights * values, of the warp's rows.
  __device__ __forceinline__ void weigh(Sums& sums, const Scores& weights,
                                        const char* values) const {
    const int lane = threadIdx.x % 32;
    const char* value = values + lane / 16 * kStride + lane % 16 * 16;
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) {
      u32 a[4];
      fragment(a, weights, k);
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        u32 b[4];
        load_transposed(b, value + j * kStride + k * 128);
        mma(sums[j], a[0], a[1], a[2], a[3], b[0], b[1], Float());
        mma(sums[j + 1], a[0], a[1], a[2], a[3], b[2], b[3], Float());
      }
    }
  }

  // Scores of the block of positions `from` on become weights, powers of two of their distance to
  // the row's highest; `factors` is what earlier sums are worth.
  __device__ __forceinline__ void soften(Scores& scores, Softmax& rows, float (&factors)[2],
                                         int from) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (rule.softcap != 0.f) {
      // tanh(u) = 1 - 2 / (exp2(2 u log2 e) + 1) is right at both ends: exp2 is 0 or infinite.
#pragma unroll
      for (int n = 0; n < kTiles * 4; ++n) {
        float& score = scores[n / 4][n % 4];
        const float power = power_of_two(score * (2 * kLog2e * rule.scale / rule.softcap));
        score = rule.softcap - __fdividef(2 * rule.softcap, power + 1);
      }
    }
    if (from + kBlock - 1 > row_position || (rule.window && from <= last_position - rule.window)) {
#pragma unroll
      for (int n = 0; n < kTiles * 4; ++n) {
        const int limit = base + (first + warp_row + n % 4 / 2 * 8 + g) / kHeads;
        const int position = from + n / 4 * 8 + t * 2 + n % 2;
        if (position > limit || (rule.window && position <= limit - rule.window))
          scores[n / 4][n % 4] = -INFINITY;
      }
    }
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
      float top = rows.highest[half_tile];
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        top = fmaxf(top, fmaxf(scores[j][2 * half_tile], scores[j][2 * half_tile + 1]));
      top = largest_of_quad(top);
      // A row that has seen nothing yet: its weights are zeros, not powers of NaN.
      const float above = top == -INFINITY ? 0.f : top * rule.unit();
      const float factor = power_of_two(rows.highest[half_tile] * rule.unit() - above);
      factors[half_tile] = factor;
      rows.highest[half_tile] = top;
      float total = rows.totals[half_tile] * factor;
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = scores[j][2 * half_tile + e];
          weight = power_of_two(weight * rule.unit() - above);
          total += weight;
        }
      rows.totals[half_tile] = total;
    }
  }

  static __device__ __forceinline__ void rescale(Sums& sums, const float (&factors)[2]) {
#pragma unroll
    for (int n = 0; n < kColumns * 4; ++n) sums[n / 4][n % 4] *= factors[n % 4 / 2];
  }

  // A block's weights for positions 8k ... 8k + 15 as the left operand.
  static __device__ __forceinline__ void fragment(u32 (&a)[4], const Scores& weights, int k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float* from = weights[k + e / 2] + e % 2 * 2;
      a[e] = pack_weights(from[0], from[1], Float());
    }
  }

  // Divides by the rows' totals and stores.
  template <typename Data, typename Sink>
  __device__ __forceinline__ void finish(const Sums& sums, const Softmax& rows, const Sink* sinks,
                                         Data* out) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
      const int row = first + warp_row + half_tile * 8 + g;
      float weight = sum_of_quad(rows.totals[half_tile]), factor = 1.f;
      if (row >= total) continue;
      const int head = kv_head * kHeads + row % kHeads;
      if (sinks) {
        const float top = rows.highest[half_tile] * rule.unit();
        const float sink = (float)sinks[head] * kLog2e, above = fmaxf(top, sink);
        factor = power_of_two(top - above);
        weight = weight * factor + power_of_two(sink - above);
      }
      factor /= weight;
      const int token = batch.q_starts[sequence] + row / kHeads;
      Data* to = out + ((size_t)token * kKvHeads * kHeads + head) * kDv + 2 * t;
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        store(to + j * 8, sums[j][2 * half_tile] * factor,
              sums[j][2 * half_tile + 1] * factor);
    }
  }

  // By mma.sync: kStages blocks of keys and values in shared memory.
  template <typename Data>
  __device__ __forceinline__ void run_warps(const Data* q, Sums& sums, Softmax& rows,
                                            char* shared) const {
    int* table = reinterpret_cast<int*>(shared);
    char* queries = shared + kTableBytes;
    char* stages = queries + kQueryBytes;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      load_keys(i, table + i * kPages, stages + i * kStageBytes);
      load_values(i, table + i * kPages, stages + i * kStageBytes + kKeyBytes);
      commit();
    }
    share_queries(q, queries);
    int next_page = threadIdx.x < kPages ? page(kStages * kPages + threadIdx.x) : 0;
    int read = 0, write = kStages - 1;
    for (int step = 0; step < steps; ++step) {
      wait<kStages - 2>();
      __syncthreads();
      char* stage = stages + write * kStageBytes;
      load_keys(step + kStages - 1, table + write * kPages, stage);
      load_values(step + kStages - 1, table + write * kPages, stage + kKeyBytes);
      commit();
      if (threadIdx.x < kPages) {  // the pages of this stage's next use, and a look further ahead
        table[read * kPages + threadIdx.x] = next_page;
        next_page = page((step + kStages + 1) * kPages + threadIdx.x);
      }
      stage = stages + read * kStageBytes;
      read = read + 1 == kStages ? 0 : read + 1;
      write = write + 1 == kStages ? 0 : write + 1;

      const int from = start + step * kBlock;
      if (from > last_position || (rule.window && from + kBlock <= row_position - rule.window + 1))
        continue;  // nothing that the warp sees
      Scores scores = {};
      float factors[2];
      score(scores, queries, stage);
      soften(scores, rows, factors, from);
      rescale(sums, factors);
      weigh(sums, scores, stage + kKeyBytes);
    }
  }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // By wgmma: the scores of a block are made while the values of the one before are weighed. So
  // keys come a block ahead of values; there are two blocks of each in shared memory.
  template <typename Data>
  __device__ __forceinline__ void run_groups(const Data* q, Sums& sums, Softmax& rows,
                                             char* shared) const {
    static_assert(kWarps % 4 == 0, "a group has four warps");
    int* table = reinterpret_cast<int*>(shared);
    char* queries = shared + kTableBytes;
    char* keys = queries + kQueryBytes;
    char* values = keys + 2 * kKeyBytes;
    const char* mine = queries + threadIdx.x / 128 * 64 * 16;
    load_keys(0, table, keys);
    share_queries(q, queries);
    commit();
    load_keys(1, table + kPages, keys + kKeyBytes);
    load_values(0, table, values);
    commit();
    int next_page = threadIdx.x < kPages ? page(3 * kPages + threadIdx.x) : 0;
    Scores scores;
    float factors[2];
    u32 weights[kTiles / 2][4];
    wait<1>();
    publish();
    __syncthreads();
    begin_groups();
    score_groups(scores, mine, keys);
    commit_groups();
    wait_groups<0>();
    settle(scores);
    soften(scores, rows, factors, start);
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) fragment(weights[k / 2], scores, k);
    int step = 0;
    for (; step + 1 < steps; ++step) {
      wait<0>();
      publish();
      __syncthreads();
      const int odd = step % 2, third = step % 3;
      load_keys(step + 2, table + (third == 0 ? 2 : third - 1) * kPages, keys + odd * kKeyBytes);
      load_values(step + 1, table + (third == 2 ? 0 : third + 1) * kPages,
                  values + (1 - odd) * kValueBytes);
      commit();
      if (threadIdx.x < kPages) {
        table[third * kPages + threadIdx.x] = next_page;
        next_page = page((step + 4) * kPages + threadIdx.x);
      }
      begin_groups();
      score_groups(scores, mine, keys + (1 - odd) * kKeyBytes);
      commit_groups();
      weigh_groups(sums, weights, values + odd * kValueBytes);
      commit_groups();
      wait_groups<1>();
      settle(scores);
      soften(scores, rows, factors, start + (step + 1) * kBlock);
      wait_groups<0>();
      settle(sums);
      rescale(sums, factors);
#pragma unroll
      for (int k = 0; k < kTiles; k += 2) fragment(weights[k / 2], scores, k);
    }
    wait<0>();
    publish();
    __syncthreads();
    begin_groups();
    weigh_groups(sums, weights, values + step % 2 * kValueBytes);
    commit_groups();
    wait_groups<0>();
    settle(sums);
  }

  static __device__ __forceinline__ void score_groups(Scores& scores, const char* queries,
                                                      const char* keys) {
    const unsigned long long a = describe(queries, kQueryStride, 128);
    const unsigned long long b = describe(keys, kStride, 128);
    multiply_group<false>(scores, a, b, Float());
#pragma unroll
    for (int k = 1; k < kSteps; ++k)
      multiply_group(scores, a + k * (2 * kQueryStride >> 4), b + k * (2 * kStride >> 4), Float());
  }

  static __device__ __forceinline__ void weigh_groups(Sums& sums,
                                                      const u32 (&weights)[kTiles / 2][4],
                                                      const char* values) {
    const unsigned long long b = describe(values, 128, kStride);
#pragma unroll
    for (int k = 0; k < kTiles / 2; ++k) weigh_columns<0>(sums, weights[k], b + k * 16);
  }

  // 16 positions of the features from 8 * kColumn on, as many at a time as an instruction takes.
  template <int kColumn>
  static __device__ __forceinline__ void weigh_columns(Sums& sums, const u32 (&weights)[4],
                                                       unsigned long long values) {
    if constexpr (kColumn < kColumns) {
      const int kLeft = kColumns - kColumn;
      const int kWidth = kLeft >= 16 ? 16 : kLeft >= 8 ? 8 : kLeft >= 4 ? 4 : 2;
      float(&part)[kWidth][4] = *reinterpret_cast<float(*)[kWidth][4]>(&sums[kColumn]);
      multiply_group<true, true>(part, weights, values + kColumn * (kStride >> 4), Float());
      weigh_columns<kColumn + kWidth>(sums, weights, values);
    }
  }

  // Keeps reads of sums behind the wait for them.
  template <int kCount>
  static __device__ __forceinline__ void settle(float (&sums)[kCount][4]) {
#pragma unroll
    for (int n = 0; n < kCount * 4; ++n) asm volatile("" : "+f"(sums[n / 4][n % 4])::"memory");
  }
#endif

  template <typename Data, typename Sink>
  __device__ __forceinline__ void run(const Data* q, const Sink* sinks, Data* out,
                                      char* shared) const {
    int* table = reinterpret_cast<int*>(shared);
    for (int i = threadIdx.x; i < kTables * kPages; i += kThreads) table[i] = page(i);
    __syncthreads();
    Sums sums = {};
    Softmax rows = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (kGroups)
      run_groups(q, sums, rows, shared);
    else
#endif
      run_warps(q, sums, rows, shared);
    finish(sums, rows, sinks, out);
  }

  static __device__ __forceinline__ u32 pack_weights(float a, float b, half) {
    __half2 h = __floats2half2_rn(a, b);
    return *reinterpret_cast<u32*>(&h);
  }
  static __device__ __forceinline__ u32 pack_weights(float a, float b, __nv_bfloat16) {
    return pack(a, b, __nv_bfloat16());
  }
  static __device__ __forceinline__ void store(float* to, float a, float b) {
    *reinterpret_cast<float2*>(to) = make_float2(a, b);
  }
  template <typename Data>
  static __device__ __forceinline__ void store(Data* to, float a, float b) {
    *reinterpret_cast<u32*>(to) = pack(a, b, Data());
  }
};

// Block (tile from the last on, K/V head) of a launch of `tiles` tiles.
template <class A, bool kSinks, typename Data, typename Sink>
__device__ __forceinline__ void attend(const void* q, const void* q_starts, const void* kv_lens,
                                       const void* tables, const void* k_pages,
                                       const void* v_pages, const void* sinks, void* out,
                                       float scale, float softcap, int window, int group,
                                       int sequences, int columns, int tile, int kv_head,
                                       void* shared) {
  const Batch batch = {static_cast<const int*>(q_starts),
                       static_cast<const int*>(kv_lens),
                       static_cast<const int*>(tables) + (size_t)group * sequences * columns,
                       k_pages,
                       v_pages,
                       sequences,
                       columns};
  const TileOfBatch found = find_tile<A::kGroupHeads, A::kRows>(batch, tile);
  await_launch();  // blocks come in waves: the launch behind would be in the way
  if (found.sequence < 0) return;
  const Rule rule = {scale, softcap, window};
  A(batch, rule, found, kv_head)
      .run(static_cast<const Data*>(q), kSinks ? static_cast<const Sink*>(sinks) : nullptr,
           static_cast<Data*>(out), static_cast<char*>(shared));
}

}  // namespace llmc
#endif
