// A device's one stream: commands are recorded in order, submitted in batches.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "memory.h"
#include "vulkan_api.h"

namespace llmc::vulkan {

class Stream {
 public:
  Stream(VkDevice device, VkQueue queue, uint32_t queue_family, Memory& memory);
  ~Stream();

  // `slots` are the kernel's arguments, in push constants or, `in_buffer`, behind an address.
  void Dispatch(VkPipeline pipeline, VkPipelineLayout layout, const uint64_t* slots,
                size_t num_slots, bool in_buffer, const uint32_t (&grid)[3]);
  void CopyOnDevice(uint64_t from, uint64_t to, uint64_t bytes);
  void CopyToDevice(const char* from, uint64_t to, uint64_t bytes);
  void CopyToHost(uint64_t from, char* to, uint64_t bytes);

  // Submits what is recorded and waits for everything; throws RuntimeError, also where the device
  // was lost before.
  void Sync();

  void SimulateDeviceLost() { lost_ = true; }

 private:
  // Commands that are submitted together, and the arguments that they read.
  struct Batch {
    VkCommandBuffer commands = VK_NULL_HANDLE;
    uint64_t serial = 0;  // of its submission; the semaphore reaches it at the batch's end
    uint64_t argument_bytes = 0;
    uint32_t num_commands = 0;
  };
  static constexpr uint32_t kNumBatches = 4;

  VkCommandBuffer Record();  // of the open batch
  void Barrier();
  void Submit();
  void WaitFor(uint64_t serial);
  void CheckAlive();
  void Run(VkResult result, const char* what);
  uint64_t Staging(uint64_t bytes);  // the offset of a place in staging_ that no command uses

  VkDevice device_;
  VkQueue queue_;
  Memory& memory_;
  VkCommandPool pool_ = VK_NULL_HANDLE;
  VkSemaphore semaphore_ = VK_NULL_HANDLE;
  std::array<Batch, kNumBatches> batches_;
  uint32_t current_ = 0;
  bool is_open_ = false;
  bool lost_ = false;
  uint64_t submitted_ = 0;
  uint64_t completed_ = 0;
  std::unique_ptr<Block> arguments_;
  std::unique_ptr<Block> staging_;
  uint64_t staging_half_ = 0;
  uint64_t staging_used_ = 0;  // bytes of that half
  std::array<uint64_t, 2> staging_serials_{};
};

}  // namespace llmc::vulkan
