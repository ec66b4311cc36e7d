// Products of many tokens y[T, M] = x[T, K] * w[M, K]^T where blocks copy in bulk (sm_90 and newer).
//
// A block has 256 rows, which are eight panels of layout chunk32 (targets/gpu/layout.py), by kTokens
// tokens. One warp copies: a stage is the same chunks of every panel, each a single copy, the tokens'
// activations, another one, and scales. Two groups of four warps multiply, as wgmma does: 64 rows are
// the same eight rows of each panel, whose distance in shared memory is constant, so that packed
// weights of 16 bits are operands as they lie. A group has two such sets of rows.
//
// Codes become float16 in registers. ldmatrix gives thread t of a quad word t of four chunks of a row,
// so that a chunk is a step of the product (4 bits: two) whose features are spread over the quad:
// activations are put into the same order (`arrange_wide`), as x16[token tile][K / 8][kTokens][8].
//
// Blocks of a cluster share a tile's features: each sums its part, then they add up each other's sums
// in shared memory. Without a cluster, blocks stay and take a tile after another.
#ifndef LLMC_WIDE
#define LLMC_WIDE

namespace llmc {

typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* at) {
  return (u32)__cvta_generic_to_shared(at);
}

__device__ __forceinline__ void init_barrier(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void arrive_expecting(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void await(u64* barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}
// `bytes`, a multiple of 16, to shared memory; the barrier counts them.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The same for what is read once: it does not take the place of what others read again.
__device__ __forceinline__ void copy_once(void* to, const void* from, int bytes, u64* barrier) {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ u32 cluster_size() {
  u32 size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same in two halves, where no memory is handed over but barriers.
__device__ __forceinline__ void arrive_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void await_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What block `rank` of the cluster has at the address that is `at` here.
__device__ __forceinline__ float read_remote(const float* at, u32 rank) {
  u32 address;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(at)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// Two tiles of eight tokens, and 16 rows times them, by a warp.
__device__ __forceinline__ void load_tokens(u32 (&to)[4], const char* tokens, int tokens_along) {
  const int lane = threadIdx.x % 32;
  load_matrices(to, tokens + lane / 8 % 2 * tokens_along + lane / 16 * 128 + lane % 8 * 16);
}
template <typename Float>
__device__ __forceinline__ void multiply_pair(float (&first)[4], float (&second)[4],
                                              const u32 (&rows)[4], const u32 (&b)[4], Float kind) {
  mma(first, rows[0], rows[1], rows[2], rows[3], b[0], b[1], kind);
  mma(second, rows[0], rows[1], rows[2], rows[3], b[2], b[3], kind);
}
// What multiply_held makes, by each warp on its own.
template <int kTiles, typename Float>
__device__ __forceinline__ void multiply_alone(float (&sums)[kTiles][4], const u32 (&rows)[4],
                                               const char* tokens, int tokens_along, Float kind) {
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    u32 b[4];
    load_tokens(b, tokens + j * 128, tokens_along);
    multiply_pair(sums[j], sums[j + 1], rows, b, kind);
  }
}
// Rows of 16 features in shared memory, or held as mma's fragments, times as many of N tokens. `across`
// is from eight rows to the next eight, `along` from eight features to the next.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int kTiles, typename Float>
__device__ __forceinline__ void multiply_stored(float (&sums)[kTiles][4], const char* rows,
                                                int along, int across, const char* tokens,
                                                int tokens_along, Float kind) {
  multiply_group(sums, describe(rows, along, across), describe(tokens, tokens_along, 128), kind);
}
template <int kTiles, typename Float>
__device__ __forceinline__ void multiply_held(float (&sums)[kTiles][4], const u32 (&rows)[4],
                                              const char* tokens, int tokens_along, Float kind) {
  multiply_group<true, false>(sums, rows, describe(tokens, tokens_along, 128), kind);
}
// Of as many registers as 384 threads can have: 168.
template <int kLeft>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kLeft));
}
template <int kAll>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kAll));
}
#else
template <int kLeft>
__device__ __forceinline__ void give_registers() {}
template <int kAll>
__device__ __forceinline__ void take_registers() {}
template <int kTiles, typename Float>
__device__ __forceinline__ void multiply_held(float (&sums)[kTiles][4], const u32 (&rows)[4],
                                              const char* tokens, int tokens_along, Float kind) {
  multiply_alone(sums, rows, tokens, tokens_along, kind);
}
template <int kTiles, typename Float>
__device__ __forceinline__ void multiply_stored(float (&sums)[kTiles][4], const char* rows,
                                                int along, int across, const char* tokens,
                                                int tokens_along, Float kind) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  u32 a[4];
  load_matrices(a, rows + (2 * warp + lane / 8 % 2) * across + lane / 16 * along + lane % 8 * 16);
  multiply_alone(sums, a, tokens, tokens_along, kind);
}
__device__ __forceinline__ void begin_groups() {}
__device__ __forceinline__ void commit_groups() {}
template <int kPending>
__device__ __forceinline__ void wait_groups() {}
#endif

// kChunks chunks of every row make a stage.
template <class F, int kTokens, int kChunks, int kStages, int kGate>
struct Wide {
  static const int kPanels = 8, kSets = 2;
  static const int kMultiplying = 256, kThreads = 384;  // one more group copies
  static const int kFeatures = kChunks * F::kChunk;
  static const int kPanelBytes = kChunks * 512;
  static const int kCodeBytes = kPanels * kPanelBytes;
  static const int kTokenBytes = kFeatures * kTokens * 2;
  static const int kScales = !F::kScaled ? 0 : F::kGroup >= kFeatures ? 1 : kFeatures / (F::kGroup ? F::kGroup : 1);
  static const int kScalePanel = kScales * 32 * (int)sizeof(typename F::Scale);
  static const int kScaleBytes = kPanels * kScalePanel;
  static const int kStageBytes = kCodeBytes + kTokenBytes + kScaleBytes * (F::kMin ? 2 : 1);
  static const int kTiles = kTokens / 8;
  static const int kBarrierBytes = 128;
  static_assert(kStages <= 8, "barriers");
  static const int kStep = F::kBits == 16 ? 2 : 1;  // chunks of a step of features

  typedef float Sums[kSets][kTiles][4];

  // The panel that lies `p`-th in shared memory, -1 behind the last. A gated activation's panels and
  // those of what it multiplies take turns.
  static __device__ __forceinline__ int panel(const Matrix& w, int row_tile, int p) {
    if (!kGate) {
      const int found = row_tile * kPanels + p;
      return found < w.panels() ? found : -1;
    }
    const int half = w.panels() / 2, found = row_tile * (kPanels / 2) + p / 2;
    return found < half ? found + p % 2 * half : -1;
  }

  static __device__ __forceinline__ int row_tiles(const Matrix& w) {
    return (w.panels() + kPanels - 1) / kPanels;
  }

  static __device__ __forceinline__ int steps(const Matrix& w) {
    return (w.chunks + kChunks - 1) / kChunks;
  }

  // Chunks and scales of a step that there are.
  static __device__ __forceinline__ int chunks_of(const Matrix& w, int step) {
    return min(kChunks, w.chunks - step * kChunks);
  }
  static __device__ __forceinline__ int first_group(int step) {
    return F::kScaled ? step * kFeatures / (F::kGroup ? F::kGroup : 1) : 0;
  }

  // By one warp: what a panel each of eight threads needs of a step.
  static __device__ __forceinline__ void load_weights(const Matrix& w, int panel, int step,
                                                      char* stage, u64* full) {
    const int p = threadIdx.x % 32;
    if (p >= kPanels || panel < 0) return;
    copy_bulk(stage + p * kPanelBytes,
              static_cast<const uint4*>(w.codes) + ((size_t)panel * w.chunks + step * kChunks) * 32,
              chunks_of(w, step) * 512, full);
    if (!F::kScaled) return;
    const int group = first_group(step), bytes = min(kScales, w.groups - group) * 32 * (int)sizeof(typename F::Scale);
    const size_t at = ((size_t)panel * w.groups + group) * 32;
    char* to = stage + kCodeBytes + kTokenBytes + p * kScalePanel;
    copy_bulk(to, static_cast<const typename F::Scale*>(w.scales) + at, bytes, full);
    if (F::kMin)
      copy_bulk(to + kScaleBytes, static_cast<const typename F::Scale*>(w.mins) + at, bytes, full);
  }

  static __device__ __forceinline__ int expected(const Matrix& w, int panels, int step) {
    int each = chunks_of(w, step) * 512;
    if (F::kScaled)
      each += min(kScales, w.groups - first_group(step)) * 32 * (int)sizeof(typename F::Scale) *
              (F::kMin ? 2 : 1);
    return panels * each + kTokenBytes;
  }

  static __device__ __forceinline__ void copy_tiles(const Matrix& w, const void* x16, int first,
                                                    int stride, int tiles, int token_tiles,
                                                    int begin, int end, char* stages, u64* full,
                                                    u64* empty) {
    const int lane = threadIdx.x % 32, all = steps(w);
    int at = 0, phase = 1;
    bool waits = true;  // for the launch that makes x16
    for (int tile = first; tile < tiles; tile += stride) {
      const int mine = lane < kPanels ? panel(w, tile / token_tiles, lane) : -1;
      const int panels = __popc(__ballot_sync(~0u, mine >= 0));
      const char* tokens =
          static_cast<const char*>(x16) + (size_t)(tile % token_tiles) * all * kTokenBytes;
      // What can be asked for at once: the weights before the activations are there.
      const int ahead = waits ? min(kStages, end - begin) : 0;
      for (int i = 0; i < ahead; ++i)
        load_weights(w, mine, begin + i, stages + i * kStageBytes, full + i);
      if (waits) await_inputs();
      waits = false;
      for (int step = begin; step < end; ++step) {
        await(empty + at, phase);
        if (lane == 0) arrive_expecting(full + at, expected(w, panels, step));
        __syncwarp();
        char* stage = stages + at * kStageBytes;
        if (step - begin >= ahead) load_weights(w, mine, step, stage, full + at);
        if (lane == kPanels)
          copy_bulk(stage + kCodeBytes, tokens + (size_t)step * kTokenBytes, kTokenBytes, full + at);
        if (++at == kStages) at = 0, phase ^= 1;
      }
    }
  }

  // Weights of 16 bits are operands as they lie.
  static __device__ __forceinline__ void multiply_floats(Sums& sums, const char* stage, int group) {
    begin_groups();
#pragma unroll
    for (int c = 0; c < kChunks; c += 2)
#pragma unroll
      for (int i = 0; i < kSets; ++i)
        multiply_stored(sums[i], stage + c * 512 + (group * kSets + i) * 128, 512, kPanelBytes,
                        stage + kCodeBytes + c * kTokens * 16, kTokens * 16, typename F::Float());
    commit_groups();
  }

  // The scales of a row's chunk c, as this thread's features have them.
  static __device__ __forceinline__ Scales<F> scales_at(const char* scales, int c) {
    const int feature = c * F::kChunk + threadIdx.x % 4 * (F::kChunk / 4);
    const int at = kScales > 1 ? feature / (F::kGroup ? F::kGroup : 1) * 32 : 0;
    Scales<F> s;
    s.scale[0] = to_half2(reinterpret_cast<const typename F::Scale*>(scales)[at]);
    if (F::kMin)
      s.min[0] = to_half2(reinterpret_cast<const typename F::Scale*>(scales + kScaleBytes)[at]);
    return s;
  }

  // Four pairs of weights of 4 bits, two of 8, which a word of codes holds.
  static __device__ __forceinline__ void decode_word(u32 word, const Scales<F>& s,
                                                     u32 (&out)[F::kBits == 4 ? 4 : 2]) {
    if constexpr (F::kBits == 4) {
      decode<F>(make_uint4(word, 0, 0, 0), s, 0, out);
    } else {
      u32 all[4];
      decode<F>(make_uint4(word, 0, 0, 0), s, 0, all);
      out[0] = all[0], out[1] = all[1];
    }
  }

  // Of few tokens, wgmma costs more than mma.sync: it takes a set's weights as long as for many.
  static const bool kAlone = kTokens <= 16;
  static const int kWordSteps = F::kBits == 4 ? 2 : 1;  // of 16 features, in a quad's words
  // There a scale multiplies sums of kRun chunks, where they share it: fewer than their weights.
  static const int kRun = 4;
  static const bool kLate = kAlone && F::kBits == 4 && F::kGroup >= kRun * F::kChunk && !F::kMin;
  typedef Format<typename F::Float, F::kBits, F::kSigned, F::kZero, typename F::Scale, 0, false> Codes;

  // Codes become fragments of a chunk while those of the chunk before are multiplied.
  static __device__ __forceinline__ void multiply_codes(Sums& sums, const char* stage, int group,
                                                        u32 (&rows)[2][kSets][kWordSteps][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const char* scales = stage + kCodeBytes + kTokenBytes;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      u32 words[4];  // of a set's two panels each
      load_matrices(words, stage + (2 * warp + lane / 8 % 2) * kPanelBytes + c * 512 +
                               ((group * kSets + lane / 16) * 8 + lane % 8) * 16);
      u32(&to)[kSets][kWordSteps][4] = rows[c % 2];
      if (!kAlone) wait_groups<1>();  // the chunk before the last has been multiplied
#pragma unroll
      for (int i = 0; i < kSets; ++i)
#pragma unroll
        for (int half_rows = 0; half_rows < 2; ++half_rows) {
          const int row = (group * kSets + i) * 8 + lane / 4;
          Scales<F> s;
          if (F::kScaled)
            s = scales_at(scales + (2 * warp + half_rows) * kScalePanel +
                              row * sizeof(typename F::Scale),
                          c);
          u32 pairs[F::kBits == 4 ? 4 : 2];
          decode_word(words[i * 2 + half_rows], s, pairs);
#pragma unroll
          for (int step = 0; step < kWordSteps; ++step)
            to[i][step][half_rows] = pairs[2 * step],
            to[i][step][2 + half_rows] = pairs[2 * step + 1];
        }
      if (!kAlone) begin_groups();
#pragma unroll
      for (int step = 0; step < kWordSteps; ++step) {
        const char* tokens = stage + kCodeBytes + (c * F::kChunk / 8 + 2 * step) * kTokens * 16;
#pragma unroll
        for (int i = 0; i < kSets; ++i)
          if constexpr (kAlone)
            multiply_alone(sums[i], to[i][step], tokens, kTokens * 16, typename F::Float());
          else
            multiply_held(sums[i], to[i][step], tokens, kTokens * 16, typename F::Float());
      }
      if (!kAlone) commit_groups();
    }
  }

  // The same where scales multiply sums.
  static __device__ __forceinline__ void multiply_late(Sums& sums, const char* stage, int group) {
    static_assert(!kLate || kChunks % kRun == 0, "a run ends within its stage");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const char* scales = stage + kCodeBytes + kTokenBytes;
#pragma unroll
    for (int first = 0; first < kChunks; first += kRun) {
      Sums run = {};
#pragma unroll
      for (int c = first; c < first + kRun; ++c) {
        u32 words[4], rows[kSets][2][4];
        load_matrices(words, stage + (2 * warp + lane / 8 % 2) * kPanelBytes + c * 512 +
                                 ((group * kSets + lane / 16) * 8 + lane % 8) * 16);
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          u32 pairs[4];
          decode<Codes>(make_uint4(words[part], 0, 0, 0), Scales<Codes>(), 0, pairs);
#pragma unroll
          for (int pair = 0; pair < 4; ++pair)
            rows[part / 2][pair / 2][pair % 2 * 2 + part % 2] = pairs[pair];
        }
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int j = 0; j < kTiles; j += 2) {
            u32 tokens[4];
            load_tokens(tokens, stage + kCodeBytes + (c * 4 + 2 * step) * kTokens * 16 + j * 128,
                        kTokens * 16);
#pragma unroll
            for (int i = 0; i < kSets; ++i)
              multiply_pair(run[i][j], run[i][j + 1], rows[i][step], tokens, typename F::Float());
          }
      }
#pragma unroll
      for (int i = 0; i < kSets; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // two tokens of a row, two of one in the next panel
          const char* panel = scales + (2 * warp + e / 2) * kScalePanel;
          const int at = first * F::kChunk / (F::kScaled ? F::kGroup : 1) * 32;
          const float scale = (float)reinterpret_cast<const typename F::Scale*>(
              panel)[at + (group * kSets + i) * 8 + lane / 4];
#pragma unroll
          for (int j = 0; j < kTiles; ++j) sums[i][j][e] += run[i][j][e] * scale;
        }
    }
  }

  // What becomes of a thread's sums of a set: rows of two panels, eight tokens after another.
  template <typename Data, typename Vector>
  struct Output {
    int row[2], stride, tokens;  // row -1: none; tokens that are left
    float scale[2], bias[2];
    const Data* residual;
    Data* y;

    __device__ __forceinline__ Output(const Matrix& w, const Epilogue<Data, Vector>& out,
                                      int row_tile, int first_token, int group, int i) {
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
      const int in_panel = (group * kSets + i) * 8 + lane / 4, token = first_token + lane % 4 * 2;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int found = panel(w, row_tile, 2 * warp + e), at = found * 32 + in_panel;
        row[e] = found < 0 || at >= w.m ? -1 : at;
        scale[e] = row[e] < 0 ? 0.f : row_scale<F>(w, at);
        bias[e] = out.bias && row[e] >= 0 ? (float)out.bias[at] : 0.f;
      }
      stride = out.m, tokens = out.tokens - token;
      const size_t start = (size_t)token * stride + row[0];
      y = out.y + start, residual = out.residual ? out.residual + start : nullptr;
    }

    __device__ __forceinline__ void skip(int eights) {
      const size_t distance = (size_t)(8 * eights) * stride;
      y += distance, tokens -= 8 * eights;
      if (residual) residual += distance;
    }

    __device__ __forceinline__ void store(const float (&sums)[4]) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (e >= tokens) break;
        float values[2] = {sums[e] * scale[0] + bias[0], sums[2 + e] * scale[1] + bias[1]};
        if (kGate) values[0] = activate<kGate>(values[0]) * values[1];
#pragma unroll
        for (int half_rows = 0; half_rows < (kGate ? 1 : 2); ++half_rows) {
          if (row[half_rows] < 0) continue;
          const int at = e * stride + half_rows * 32;  // panels that follow each other
          if (residual) values[half_rows] += (float)residual[at];
          y[at] = (Data)values[half_rows];
        }
      }
      skip(1);
    }
  };

  template <typename Data, typename Vector>
  static __device__ __forceinline__ void multiply_tiles(const Matrix& w,
                                                        const Epilogue<Data, Vector>& out,
                                                        int first, int stride, int tiles,
                                                        int token_tiles, int begin, int end,
                                                        char* stages, u64* full, u64* empty) {
    const int group = threadIdx.x / 128;
    int at = 0, phase = 0;
    for (int tile = first; tile < tiles; tile += stride) {
      Sums sums = {};
      u32 rows[2][kSets][kWordSteps][4];
      int last = -1;
      for (int step = begin; step < end; ++step) {
        await(full + at, phase);
        const char* stage = stages + at * kStageBytes;
        if (F::kBits == 16) {
          multiply_floats(sums, stage, group);
          wait_groups<1>();
        } else if constexpr (kLate) {
          multiply_late(sums, stage, group);
        } else {
          multiply_codes(sums, stage, group, rows);
        }
        // The products of the step before have ended: of codes, all but a chunk's of this one.
        if (last >= 0 && threadIdx.x % 32 == 0) arrive(empty + last);
        last = at;
        if (++at == kStages) at = 0, phase ^= 1;
      }
      wait_groups<0>();
      if (last >= 0 && threadIdx.x % 32 == 0) arrive(empty + last);
      const int row_tile = tile / token_tiles, first_token = tile % token_tiles * kTokens;
      if (cluster_size() == 1) {
#pragma unroll
        for (int i = 0; i < kSets; ++i) {
          Output<Data, Vector> to(w, out, row_tile, first_token, group, i);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) to.store(sums[i][j]);
        }
      } else {
        float* shared = reinterpret_cast<float*>(stages);
        asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory");  // others may read a stage
#pragma unroll
        for (int i = 0; i < kSets; ++i)
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              shared[((i * kTiles + j) * 4 + e) * kMultiplying + threadIdx.x] = sums[i][j][e];
        sync_cluster();
        for (int part = cluster_rank(); part < kSets * kTiles; part += cluster_size()) {
          float total[4] = {};
          for (int rank = 0; rank < cluster_size(); ++rank)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              total[e] += read_remote(shared + (part * 4 + e) * kMultiplying + threadIdx.x, rank);
          Output<Data, Vector> to(w, out, row_tile, first_token, group, part / kTiles);
          to.skip(part % kTiles);
          to.store(total);
        }
        sync_cluster();
      }
    }
  }

  // Blocks of a cluster follow each other; without clusters each stays for every grid-th tile.
  template <typename Data, typename Vector>
  static __device__ __forceinline__ void run(const Matrix& w, const void* x16,
                                             const Epilogue<Data, Vector>& out, int block,
                                             int blocks, char* shared) {
    const int size = cluster_size(), rank = cluster_rank(), all = steps(w);
    const int token_tiles = (out.tokens + kTokens - 1) / kTokens;
    const int tiles = row_tiles(w) * token_tiles, first = block / size, stride = blocks / size;
    const int begin = all * rank / size, end = all * (rank + 1) / size;
    u64* full = reinterpret_cast<u64*>(shared);
    u64* empty = full + 8;
    char* stages = shared + kBarrierBytes;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) init_barrier(full + i, 1), init_barrier(empty + i, kMultiplying / 32);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    // Where a row ends within a stage, what no copy fills must be numbers: zeros, or older weights.
    if (w.chunks % kChunks)
      for (int i = threadIdx.x; i < kStages * kStageBytes / 16; i += kThreads)
        reinterpret_cast<uint4*>(stages)[i] = make_uint4(0, 0, 0, 0);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x >= kMultiplying) {
      give_registers<40>();
      if (threadIdx.x < kMultiplying + 32)
        copy_tiles(w, x16, first, stride, tiles, token_tiles, begin, end, stages, full, empty);
    } else {
      take_registers<232>();
      await_inputs();
      multiply_tiles(w, out, first, stride, tiles, token_tiles, begin, end, stages, full, empty);
    }
  }
};

// Eight features of x16 from where `feature` lies, for thread-ordered codes: pairs of features that
// are as far apart as the quad's words.
template <class F>
__device__ __forceinline__ int wide_feature(int q, int i) {
  if (F::kBits == 16) return q * 8 + i;
  const int kSpread = F::kChunk / 8, kWord = F::kChunk / 4;  // eights of a chunk, features of a word
  return q / kSpread * F::kChunk + i / 2 * kWord + q % kSpread * 2 + i % 2;
}

// Features from `first` on, eight of k; zeros behind the last.
template <typename Data>
__device__ __forceinline__ void load_eight(float* to, const Data* from, int first, int k) {
  if (k % 8 == 0 && first < k) {
    uint4 raw[sizeof(Data) / 2];
#pragma unroll
    for (int i = 0; i < sizeof(Data) / 2; ++i)
      raw[i] = reinterpret_cast<const uint4*>(from + first)[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = (float)reinterpret_cast<const Data*>(raw)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = first + i < k ? (float)from[first + i] : 0.f;
  }
}

// x[tokens, K], normalized where there is a norm, into x16: two tokens a block of 256 threads, whose
// features `shares` blocks divide among them.
template <class F, bool kNorm, int kTokens, typename Data, typename NormVector>
__device__ __forceinline__ void arrange_wide(const void* from, const void* norms, void* x16, int k,
                                             int tokens, int features, float eps, float offset,
                                             int block, int share, int shares) {
  const int kShare = 128, kEights = F::kBits == 16 ? 1 : F::kChunk / 8;
  __shared__ float parts[8];
  await_inputs();
  float scale = 1.f;
  if (kNorm) {  // four warps a token
    const int token = block * 2 + threadIdx.x / kShare;
    const Data* x = static_cast<const Data*>(from) + (size_t)token * k;
    float squares = 0.f;
    for (int i = threadIdx.x % kShare * 8; token < tokens && i < k; i += kShare * 8) {
      float values[8];
      load_eight(values, x, i, k);
#pragma unroll
      for (int e = 0; e < 8; ++e) squares += values[e] * values[e];
    }
#pragma unroll
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
    __syncthreads();
  }
  // Neighbours of two tokens, since they lie side by side in x16.
  const int which = threadIdx.x % 2, token = block * 2 + which;
  if (kNorm) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) total += parts[which * 4 + i];
    scale = rsqrtf(total / k + eps);
  }
  const Data* x = static_cast<const Data*>(from) + (size_t)token * k;
  uint4* to = static_cast<uint4*>(x16) + (size_t)(token / kTokens) * (features / 8) * kTokens +
              token % kTokens;
  for (int first = (share * kShare + threadIdx.x / 2) * kEights; first < features / 8;
       first += shares * kShare * kEights) {
    float values[kEights * 8];
#pragma unroll
    for (int q = 0; q < kEights; ++q) {
      const int feature = (first + q) * 8;
      load_eight(values + q * 8, x, feature, token < tokens ? k : 0);
      if (kNorm) {
        float weights[8];
        load_eight(weights, static_cast<const NormVector*>(norms), feature, k);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[q * 8 + i] *= scale * (weights[i] + offset);
      }
    }
#pragma unroll
    for (int q = 0; q < kEights; ++q) {
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i] = pack(values[wide_feature<F>(q, 2 * i)], values[wide_feature<F>(q, 2 * i + 1)],
                        typename F::Float());
      to[(size_t)(first + q) * kTokens] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

template <class F, bool kBias, bool kResidual, typename Data, typename Vector, class W>
__device__ __forceinline__ void multiply_wide(const void* codes, const void* scales,
                                              const void* mins, const void* x16, const void* bias,
                                              const void* residual, void* y, int m, int outputs,
                                              int k, int chunks, int groups, int tokens, int block,
                                              int blocks, void* shared) {
  const Matrix w = {codes, scales, mins, m, k, chunks, groups};
  const Epilogue<Data, Vector> out = {
      kBias ? static_cast<const Vector*>(bias) : nullptr,
      kResidual ? static_cast<const Data*>(residual) : nullptr, static_cast<Data*>(y), outputs,
      tokens};
  W::run(w, x16, out, block, blocks, static_cast<char*>(shared));
}

}  // namespace llmc
#endif
