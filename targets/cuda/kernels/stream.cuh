// Products of one token whose weights stream through shared memory (sm_90 and newer).
//
// A decode step is a chain of launches of a few microseconds, each of which waits for the one before.
// While one waits, prepares its activations or adds up its sums, its weights have to be on their way
// all the same. So a block here has one warp that copies a panel's next chunks in bulk into a ring of
// stages, from the moment that it is launched, which is before its input is there (launches.py). It
// takes less than half a multiprocessor's shared memory, so that the next product's blocks find room
// beside it.
//
// The other eight warps share a stage's chunks. A thread has one of the panel's 32 rows, so that a
// warp reads 512 bytes in order and its activations are the same for all. Blocks of a cluster share
// the features of their panels; sums stay in shared memory until all panels are done.
//
// RMSNorm, gated activation, arithmetic and formats are those of gemv.cuh.
#ifndef LLMC_STREAM
#define LLMC_STREAM

namespace llmc {

template <class F, int kStageChunks, int kStages, int kGate>
struct Stream {
  typedef typename F::Scale Scale;
  static const int kWarps = 8, kMultiplying = kWarps * 32, kThreads = kMultiplying + 32;
  static const int kEach = kStageChunks / kWarps;  // chunks of a stage for each warp
  typedef Gemv<F, kWarps + 1, 1> Product;
  // Blocks of a cluster begin where a scale does, and a superblock.
  static const int kUnit = F::kGroup > F::kBlock ? F::kGroup / F::kChunk : 4;
  static const int kGroup = F::kScaled ? F::kGroup : 1;  // features of a scale, where there are any
  static const int kStageScales =
      F::kScaled ? (kStageChunks * F::kChunk + kGroup - 1) / kGroup : 0;
  static const int kCodeBytes = kStageChunks * 512;
  static const int kScaleBytes = kStageScales * 32 * (int)sizeof(Scale);
  static const int kStageBytes = kCodeBytes + kScaleBytes * (F::kMin ? 2 : 1);
  static const int kBarrierBytes = 128;
  static const int kParts = kGate ? 2 : 1;
  static_assert(kStageChunks % kUnit == 0, "stages begin where a scale does");
  static_assert(kStages <= 8, "barriers");

  // What a block has to do: chunks begin to end of every cluster-th panel, of a gated activation's
  // panels and those of what it multiplies by turns.
  struct Work {
    int first, stride, panels, half, begin, end, steps;

    __device__ Work(const Matrix& w, int block, int blocks) {
      const int size = cluster_size(), rank = cluster_rank();
      const int units = (w.chunks + kUnit - 1) / kUnit, tiles = w.panels() / kParts;
      first = block / size, stride = blocks / size, half = tiles;
      panels = first < tiles ? (tiles - first + stride - 1) / stride * kParts : 0;
      begin = min(w.chunks, units * rank / size * kUnit);
      end = min(w.chunks, units * (rank + 1) / size * kUnit);
      steps = (end - begin + kStageChunks - 1) / kStageChunks;
    }
    __device__ int stages() const { return panels * steps; }
    __device__ int row(int item) const { return (first + item / 32 * stride) * 32 + item % 32; }
    __device__ int panel(int i) const { return first + i / kParts * stride + i % kParts * half; }
  };

  // By one thread: the chunks of a stage and their scales.
  static __device__ __forceinline__ void load(const Matrix& w, const Work& work, int number,
                                              char* stage, u64* full) {
    const int begin = work.begin + number % work.steps * kStageChunks;
    const int chunks = min(kStageChunks, work.end - begin);
    const size_t panel = work.panel(number / work.steps);
    const int group = begin * F::kChunk / kGroup;
    const int scales = min((chunks * F::kChunk + kGroup - 1) / kGroup, w.groups - group);
    const int bytes = scales * 32 * (int)sizeof(Scale);
    arrive_expecting(full, chunks * 512 + (F::kScaled ? bytes * (F::kMin ? 2 : 1) : 0));
    copy_once(stage, static_cast<const uint4*>(w.codes) + (panel * w.chunks + begin) * 32,
              chunks * 512, full);
    if (!F::kScaled) return;
    const size_t at = (panel * w.groups + group) * 32;
    copy_once(stage + kCodeBytes, static_cast<const Scale*>(w.scales) + at, bytes, full);
    if (F::kMin)
      copy_once(stage + kCodeBytes + kScaleBytes, static_cast<const Scale*>(w.mins) + at, bytes,
                full);
  }

  // This thread's row of a stage; x begins with the block's first chunk, `offset` chunks before.
  static __device__ __forceinline__ float multiply(const char* stage, const char* x, int chunks,
                                                   int offset, int blocks) {
    const int warp = threadIdx.x / 32;
    float sums[kEach] = {};
    // A whole stage has no conditions: the compiler may ask for all of it before it multiplies.
    if (chunks >= kStageChunks) {
#pragma unroll
      for (int u = 0; u < kEach; ++u) sums[u] = multiply_chunk(stage, x, u * kWarps + warp, offset, blocks);
    } else {
      for (int chunk = warp; chunk < chunks; chunk += kWarps)
        sums[0] += multiply_chunk(stage, x, chunk, offset, blocks);
    }
    float sum = 0.f;
#pragma unroll
    for (int u = 0; u < kEach; ++u) sum += sums[u];
    return sum;
  }

  static __device__ __forceinline__ float multiply_chunk(const char* stage, const char* x, int chunk,
                                                         int offset, int blocks) {
    const int lane = threadIdx.x % 32;
    const uint4 raw = reinterpret_cast<const uint4*>(stage)[chunk * 32 + lane];
    Scale scale[F::kChunkScales], min[F::kChunkScales];
#pragma unroll
    for (int part = 0; F::kScaled && part < F::kChunkScales; ++part) {
      const int group = F::kChunkScales > 1 ? chunk * F::kChunkScales + part
                                            : chunk * F::kChunk / kGroup;
      const Scale* scales = reinterpret_cast<const Scale*>(stage + kCodeBytes) + group * 32 + lane;
      scale[part] = scales[0];
      if (F::kMin) min[part] = scales[kStageScales * 32];
    }
    return Product::product(raw, scale, min, x, offset + chunk, blocks);
  }

  // All panels' sums of this block's features, totals[panel][32].
  static __device__ __forceinline__ void multiply_all(const Work& work, const char* x, int blocks,
                                                      char* stages, u64* full, u64* empty,
                                                      float* sums_of_warps, float* totals) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int at = 0, phase = 0;
    for (int i = 0; i < work.panels; ++i) {
      float sum = 0.f;
      for (int step = 0; step < work.steps; ++step) {
        const int offset = step * kStageChunks;
        await(full + at, phase);
        sum += multiply(stages + at * kStageBytes, x, work.end - work.begin - offset, offset, blocks);
        __syncwarp();
        if (lane == 0) arrive(empty + at);
        if (++at == kStages) at = 0, phase ^= 1;
      }
      float* sums = sums_of_warps + i % 2 * kMultiplying;
      sums[warp * 32 + lane] = sum;
      asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory");
      if (warp != i % kWarps) continue;
      sum = 0.f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) sum += sums[other * 32 + lane];
      totals[i * 32 + lane] = sum;
    }
  }

  template <bool kNorm, typename Data, typename Vector, typename NormVector>
  static __device__ __forceinline__ void run(const Matrix& w, const Data* x,
                                             const Norm<NormVector>& norm,
                                             const Epilogue<Data, Vector>& out, int block,
                                             int blocks, char* shared) {
    const Work work(w, block, blocks);
    const int size = cluster_size(), all = work.stages();
    u64 *full = reinterpret_cast<u64*>(shared), *empty = full + 8;
    float* sums_of_warps = reinterpret_cast<float*>(shared + kBarrierBytes);  // [2][kWarps][32]
    char* stages = reinterpret_cast<char*>(sums_of_warps + 2 * kMultiplying);
    float* totals = reinterpret_cast<float*>(stages + kStages * kStageBytes);
    char* arranged = reinterpret_cast<char*>(totals + work.panels * 32);
    if (threadIdx.x == kMultiplying) {
      for (int i = 0; i < kStages; ++i) init_barrier(full + i, 1), init_barrier(empty + i, kWarps);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      for (int i = 0; i < min(kStages, all); ++i)
        load(w, work, i, stages + i * kStageBytes, full + i);
    }
    const NormVector* norms = kNorm ? norm.weight + work.begin * F::kChunk : nullptr;
    const int features =
        max(0, min(w.k - work.begin * F::kChunk, (work.end - work.begin) * F::kChunk));
    if (kNorm)  // weights like the others: on their way before the input is there
      for (int i = threadIdx.x * 32; i < features; i += kThreads * 32)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(norms + i));
    await_inputs();
    const int items = work.panels / kParts * 32;
    const int first_item = cluster_rank() * kThreads + threadIdx.x;
    float residual = 0.f;  // of the first item
    if (out.residual && first_item < items) residual = (float)out.residual[work.row(first_item)];
    const int superblocks = (work.end - work.begin + 3) / 4;
    const float scale = Product::template norm_scale<kNorm>(x, norm, w.k, sums_of_warps);
    const Norm<NormVector> mine = {norms, norm.eps, norm.offset};
    Product::template arrange<kNorm>(x + work.begin * F::kChunk, mine, scale, arranged, features,
                                     superblocks);
    if (threadIdx.x < kMultiplying) {
      multiply_all(work, arranged, superblocks, stages, full, empty, sums_of_warps, totals);
    } else if (threadIdx.x == kMultiplying) {
      int at = 0, phase = 0;
      for (int i = kStages; i < all; ++i) {
        await(empty + at, phase);
        load(w, work, i, stages + at * kStageBytes, full + at);
        if (++at == kStages) at = 0, phase ^= 1;
      }
    }
    __syncwarp();
    if (size > 1) sync_cluster();
    else __syncthreads();
    for (int item = first_item; item < items; item += size * kThreads) {
      const int row = work.row(item);
      float values[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float* from = totals + (item / 32 * kParts + part) * 32 + item % 32;
        const int weight_row = row + part * work.half * 32;
        float sum = 0.f;
        for (int rank = 0; rank < size; ++rank) sum += size > 1 ? read_remote(from, rank) : *from;
        values[part] = sum * row_scale<F>(w, weight_row);
        if (out.bias) values[part] += (float)out.bias[weight_row];
      }
      if (kGate) values[0] = activate<kGate>(values[0]) * values[kParts - 1];
      if (out.residual)
        values[0] += item == first_item ? residual : (float)out.residual[row];
      out.y[row] = (Data)values[0];
    }
    if (size > 1) sync_cluster();  // others may still read this block's sums
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
