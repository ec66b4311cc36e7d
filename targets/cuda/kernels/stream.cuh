// Products of one token whose weights stream through shared memory (sm_90 and newer).
//
// A decode step is a chain of launches of a few microseconds, each of which waits for the one before.
// While one waits, prepares its activations or adds up its sums, its weights have to be on their way
// all the same. So a block here has one warp that copies a panel's next chunks in bulk into a ring of
// stages, from the moment that it is launched, which is before its input is there (launches.py). Its
// shared memory is half a multiprocessor's, so that the next product's block finds room beside it.
//
// The other eight warps share a stage's chunks: 16-bit weights by rows, in float32; codes as tiles of
// 16 rows of an integer mma, whose columns are the upper and the lower bytes of x (see gemv.cuh).
// Such sums are exact; a run of features with the same scale becomes a float at once. Blocks of a
// cluster share the features of their panels and send each other their sums.
//
// RMSNorm, gated activation, arithmetic and formats are those of gemv.cuh.
#ifndef LLMC_STREAM
#define LLMC_STREAM

namespace llmc {

// mma.sync m16n8k32 of bytes: codes (signed or not) times x's.
template <bool kSigned>
__device__ __forceinline__ void mma_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                          u32 b1) {
  if (kSigned)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A float into the shared memory of block `rank` of the cluster, whose barrier counts its bytes.
__device__ __forceinline__ void send(float* to, float value, u64* barrier, u32 rank) {
  u32 address, counter;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(to)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(counter)
               : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   address),
               "r"(__float_as_uint(value)), "r"(counter)
               : "memory");
}

template <class F, int kStageChunks, int kStages, int kCluster, int kGate>
struct Stream {
  typedef typename F::Scale Scale;
  static const bool kFloats = F::kBits == 16;
  static const int kWarps = 8, kMultiplying = kWarps * 32, kThreads = kMultiplying + 32;
  static const int kEach = kStageChunks / kWarps;  // chunks of a stage for each warp
  // Blocks of a cluster begin where a scale does, and a superblock.
  static const int kUnit = F::kGroup > F::kBlock ? F::kGroup / F::kChunk : 4;
  static const int kGroup = F::kScaled ? F::kGroup : 1;  // features of a scale, where there are any
  // Codes: features whose products are summed as integers, of one or two scales.
  static const int kRun = F::kGroup == 0 || F::kGroup >= F::kBlock ? F::kBlock
                          : F::kGroup > 32                         ? F::kGroup
                                                                   : 32;
  static const int kScalesOfRun = F::kGroup == 16 ? 2 : 1, kSum = kRun / kScalesOfRun;
  static const int kRunChunks = kFloats ? 1 : kRun / F::kChunk;
  static const int kStageScales =
      F::kScaled ? (kStageChunks * F::kChunk + kGroup - 1) / kGroup : 0;
  static const int kCodeBytes = kStageChunks * 512;
  static const int kScaleBytes = kStageScales * 32 * (int)sizeof(Scale);
  static const int kStageBytes = kCodeBytes + kScaleBytes * (F::kMin ? 2 : 1);
  static const int kBarrierBytes = 256;
  static const int kParts = kGate ? 2 : 1;
  static_assert(kStageChunks % kUnit == 0, "stages begin where a scale does");
  static_assert(kStageChunks == 4 * kWarps, "a superblock for each warp");
  static_assert(kStages <= 8, "barriers");

  // What a block has to do: chunks begin to end of every cluster-th panel, of a gated activation's
  // panels and those of what it multiplies by turns. The blocks of a cluster bring the sums of its
  // tiles together by turns.
  struct Work {
    int rank, first, stride, tiles, half, begin, end, steps;

    __device__ Work(const Matrix& w, int block, int blocks) {
      rank = kCluster > 1 ? cluster_rank() : 0;
      const int units = (w.chunks + kUnit - 1) / kUnit, all = w.panels() / kParts;
      first = block / kCluster, stride = blocks / kCluster, half = all;
      tiles = first < all ? (all - first + stride - 1) / stride : 0;
      begin = min(w.chunks, units * rank / kCluster * kUnit);
      end = min(w.chunks, units * (rank + 1) / kCluster * kUnit);
      steps = (end - begin + kStageChunks - 1) / kStageChunks;
    }
    __device__ int panels() const { return tiles * kParts; }
    __device__ int stages() const { return panels() * steps; }
    __device__ int panel(int i) const { return first + i / kParts * stride + i % kParts * half; }
    __device__ int own_tiles() const { return (tiles - rank + kCluster - 1) / kCluster; }
    __device__ int sums() const { return (tiles + kCluster - 1) / kCluster * kParts * 32; }  // of a block
    // Of the block's own rows; the same row of the matrix.
    __device__ int row(int item) const {
      return (first + (item / 32 * kCluster + rank) * stride) * 32 + item % 32;
    }
  };

  // Where a stage comes from: chunks of a panel and their scales.
  struct Piece {
    const uint4* codes;
    const Scale *scales, *mins;
    int code_bytes, scale_bytes;

    __device__ Piece(const Matrix& w, const Work& work, int number) {
      const int begin = work.begin + number % work.steps * kStageChunks;
      const int chunks = min(kStageChunks, work.end - begin);
      const size_t panel = work.panel(number / work.steps);
      codes = static_cast<const uint4*>(w.codes) + (panel * w.chunks + begin) * 32;
      code_bytes = chunks * 512;
      const int group = begin * F::kChunk / kGroup;
      const size_t at = (panel * w.groups + group) * 32;
      scales = static_cast<const Scale*>(w.scales) + at;
      mins = static_cast<const Scale*>(w.mins) + at;
      scale_bytes = min((chunks * F::kChunk + kGroup - 1) / kGroup, w.groups - group) * 32 *
                    (int)sizeof(Scale);
    }
    __device__ __forceinline__ void load(char* stage, u64* full) const {
      arrive_expecting(full, code_bytes + (F::kScaled ? scale_bytes * (F::kMin ? 2 : 1) : 0));
      copy_once(stage, codes, code_bytes, full);
      if (F::kScaled) copy_once(stage + kCodeBytes, scales, scale_bytes, full);
      if (F::kMin) copy_once(stage + kCodeBytes + kScaleBytes, mins, scale_bytes, full);
    }
  };

  // Floats: this thread's row of a stage's chunks, which every warp shares; x begins with the block's
  // first chunk, `offset` chunks before.
  static __device__ __forceinline__ void multiply_floats(float (&sums)[4], const char* stage,
                                                         const char* x, int chunks, int offset) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // A whole stage has no conditions: the compiler may ask for all of it before it multiplies.
    if (chunks >= kStageChunks) {
#pragma unroll
      for (int u = 0; u < kEach; ++u)
        sums[u % 4] += multiply_chunk(stage, x, u * kWarps + warp, lane, offset);
    } else {
      for (int chunk = warp; chunk < chunks; chunk += kWarps)
        sums[0] += multiply_chunk(stage, x, chunk, lane, offset);
    }
  }
  static __device__ __forceinline__ float multiply_chunk(const char* stage, const char* x, int chunk,
                                                         int lane, int offset) {
    const uint4 raw = reinterpret_cast<const uint4*>(stage)[chunk * 32 + lane];
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    const float4* at = reinterpret_cast<const float4*>(x) + (offset + chunk) * 2;
    const float4 low = at[0], high = at[1];
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack(words[i], typename F::Float());
      sum += pair.x * values[2 * i];
      sum += pair.y * values[2 * i + 1];
    }
    return sum;
  }

  // Codes: a warp has four chunks of a stage, whose 32 rows are two tiles of an mma. ldmatrix gives
  // thread t of a quad word t of a row; upper and lower bytes of x are two columns, or two for each of
  // the run's scales. So thread t has the sums of scale t of rows 8r + g.
  static __device__ __forceinline__ void multiply_codes(float (&sums)[4], const char* stage,
                                                        const char* x, int chunks, int offset,
                                                        int blocks) {
    const int lane = threadIdx.x % 32, unit = threadIdx.x / 32 * 4, g = lane / 4, t = lane % 4;
    if (unit >= chunks) return;
    u32 raw[4][4];
#pragma unroll
    for (int c = 0; c < 4; ++c) load_matrices(raw[c], stage + (unit + c) * 512 + lane * 16);
    const float2* parts = reinterpret_cast<const float2*>(x + blocks * F::kBlock * 2);
#pragma unroll
    for (int first = 0; first < 4; first += kRunChunks) {
      int d[2][4] = {};
#pragma unroll
      for (int c = first; c < first + kRunChunks; c += F::kBits == 4 ? 1 : 2) {
        const char* at = x + (offset + unit + c) * F::kChunk * 2 + g % 2 * 8;
        u32 columns[2];
        if (F::kBits == 4) {
          const uint2 both = *reinterpret_cast<const uint2*>(at + t * 16);
          const bool mine = kScalesOfRun == 1 || g / 2 == t / 2;
          columns[0] = mine ? both.x : 0, columns[1] = mine ? both.y : 0;
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i)
            columns[i] = kScalesOfRun == 1 || g / 2 == i
                             ? *reinterpret_cast<const u32*>(at + i * 32 + t / 2 * 16 + t % 2 * 4)
                             : 0;
        }
        u32 low[4], high[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          low[r] = F::kBits == 4 ? raw[c][r] & 0x0f0f0f0fu : raw[c][r];
          high[r] = F::kBits == 4 ? raw[c][r] >> 4 & 0x0f0f0f0fu : raw[(c + 1) % 4][r];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
          mma_bytes<F::kSigned>(d[i], low[2 * i], low[2 * i + 1], high[2 * i], high[2 * i + 1],
                                columns[0], columns[1]);
      }
      const int which = kScalesOfRun == 1 ? 0 : t % 2, feature = (unit + first) * F::kChunk;
      const float2 whole =  // of x: its scale, its sum
          parts[(offset * F::kChunk + feature) / kSum + which];
      const Scale* scales = reinterpret_cast<const Scale*>(stage + kCodeBytes) +
                            (feature / kGroup + which) * 32 + g;
      // What lies behind the last chunk may be no numbers.
      const bool there = feature + which * kSum < chunks * F::kChunk;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float value = (float)(d[r / 2][r % 2 * 2] * 256 + d[r / 2][r % 2 * 2 + 1]);
        if (F::kZero) value -= F::kZero * whole.y;
        value *= whole.x;
        if (F::kScaled) value *= there ? (float)scales[r * 8] : 0.f;
        if (F::kMin)
          value += (there ? (float)scales[kStageScales * 32 + r * 8] : 0.f) * (whole.x * whole.y);
        sums[r] += value;
      }
    }
  }

  // Sums of this block's features go to where the rows of their tile are brought together,
  // sums[rank][tile][part][32].
  static __device__ __forceinline__ void multiply_all(const Work& work, const char* x, int blocks,
                                                      char* stages, u64* full, u64* empty,
                                                      float* sums_of_warps, float* totals,
                                                      u64* done) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int at = 0, phase = 0;
    for (int i = 0; i < work.panels(); ++i) {
      float sums[4] = {};
      for (int step = 0; step < work.steps; ++step) {
        const int offset = step * kStageChunks, chunks = work.end - work.begin - offset;
        const char* stage = stages + at * kStageBytes;
        await(full + at, phase);
        if (kFloats) multiply_floats(sums, stage, x, chunks, offset);
        else multiply_codes(sums, stage, x, chunks, offset, blocks);
        arrive(empty + at);
        if (++at == kStages) at = 0, phase ^= 1;
      }
      float* mine = sums_of_warps + i % 2 * kMultiplying + warp * 32;
      if (kFloats) {
        mine[lane] = sums[0] + sums[1] + sums[2] + sums[3];
      } else {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (kScalesOfRun == 2) sums[r] += __shfl_xor_sync(~0u, sums[r], 1);
          if (lane % 4 == 0) mine[r * 8 + lane / 4] = sums[r];
        }
      }
      asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory");
      if (warp != i % kWarps) continue;
      float sum = 0.f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other)
        sum += sums_of_warps[i % 2 * kMultiplying + other * 32 + lane];
      const int tile = i / kParts;
      float* to = totals + work.rank * work.sums() + (tile / kCluster * kParts + i % kParts) * 32;
      if (kCluster > 1) send(to + lane, sum, done, tile % kCluster);
      else to[lane] = sum;
    }
  }

  template <bool kNorm, typename Data, typename Vector, typename NormVector>
  static __device__ __forceinline__ void run(const Matrix& w, const Data* x,
                                             const Norm<NormVector>& norm,
                                             const Epilogue<Data, Vector>& out, int block,
                                             int blocks, char* shared) {
    if (threadIdx.x >= kThreads) return;
    const Work work(w, block, blocks);
    const int all = work.stages(), items = work.own_tiles() * 32;
    u64 *full = reinterpret_cast<u64*>(shared), *empty = full + 8, *done = full + 16;
    float* sums_of_warps = reinterpret_cast<float*>(shared + kBarrierBytes);  // [2][kWarps][32]
    char* stages = reinterpret_cast<char*>(sums_of_warps + 2 * kMultiplying);
    float* totals = reinterpret_cast<float*>(stages + kStages * kStageBytes);
    char* arranged = reinterpret_cast<char*>(totals + kCluster * work.sums());
    if (threadIdx.x == kMultiplying) {
      for (int i = 0; i < kStages; ++i) init_barrier(full + i, 1), init_barrier(empty + i, kMultiplying);
      init_barrier(done, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      if (kCluster > 1) arrive_expecting(done, items * kParts * kCluster * 4);
#pragma unroll 1
      for (int i = 0; i < min(kStages, all); ++i)
        Piece(w, work, i).load(stages + i * kStageBytes, full + i);
    }
    __syncwarp();
    if (kCluster > 1) arrive_cluster();
    const int superblocks = (work.end - work.begin + 3) / 4, begin = work.begin * F::kChunk;
    const int features = max(0, min(w.k - begin, (work.end - work.begin) * F::kChunk));
    Activations<F, kThreads, kRun, kSum, kNorm ? 2 : 4, kNorm, Data, NormVector> activations(
        norm, begin, features, superblocks);
    await_inputs();
    float residual = 0.f;  // of the first item
    if (out.residual && threadIdx.x < items) residual = (float)out.residual[work.row(threadIdx.x)];
    activations.arrange(x, w.k, arranged, sums_of_warps);
    if (kCluster > 1) await_cluster();  // its barriers are there
    if (threadIdx.x < kMultiplying) {
      multiply_all(work, arranged, superblocks, stages, full, empty, sums_of_warps, totals, done);
    } else if (threadIdx.x == kMultiplying) {
      int at = 0, phase = 0;
#pragma unroll 1
      for (int i = kStages; i < all; ++i) {
        const Piece piece(w, work, i);
        await(empty + at, phase);
        piece.load(stages + at * kStageBytes, full + at);
        if (++at == kStages) at = 0, phase ^= 1;
      }
    }
    __syncwarp();
    if (kCluster > 1) await(done, 0);
    else __syncthreads();
    for (int item = threadIdx.x; item < items; item += kThreads) {
      const int row = work.row(item);
      float values[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float* from = totals + (item / 32 * kParts + part) * 32 + item % 32;
        const int weight_row = row + part * work.half * 32;
        float sum = 0.f;
        for (int rank = 0; rank < kCluster; ++rank) sum += from[rank * work.sums()];
        values[part] = sum * row_scale<F>(w, weight_row);
        if (out.bias) values[part] += (float)out.bias[weight_row];
      }
      if (kGate) values[0] = activate<kGate>(values[0]) * values[kParts - 1];
      if (out.residual)
        values[0] += item == threadIdx.x ? residual : (float)out.residual[row];
      out.y[row] = (Data)values[0];
    }
  }
};

template <class F, bool kNorm, bool kBias, bool kResidual, typename Data, typename Vector,
          typename NormVector, class S>
__device__ __forceinline__ void stream(const void* codes, const void* scales, const void* mins,
                                       const void* x, const void* norm, const void* bias,
                                       const void* residual, void* y, int m, int k, int chunks,
                                       int groups, float eps, float offset, int block, int blocks,
                                       void* shared) {
  const Matrix w = {codes, scales, mins, m, k, chunks, groups};
  const Norm<NormVector> of = {static_cast<const NormVector*>(norm), eps, offset};
  const Epilogue<Data, Vector> out = {kBias ? static_cast<const Vector*>(bias) : nullptr,
                                      kResidual ? static_cast<const Data*>(residual) : nullptr,
                                      static_cast<Data*>(y), m / S::kParts, 1};
  S::template run<kNorm>(w, static_cast<const Data*>(x), of, out, block, blocks,
                         static_cast<char*>(shared));
}

}  // namespace llmc
#endif
