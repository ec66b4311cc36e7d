#include "stream.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstring>

namespace llmc::vulkan {
namespace {

constexpr uint32_t kCommandsPerBatch = 64;  // enough that submitting them costs little
constexpr uint64_t kArgumentBytes = 64 << 10;  // of a batch
constexpr uint64_t kStagingBytes = 8ull << 20;  // of each half: one is filled, one is copied
constexpr VkAccessFlags kReads =
    VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_TRANSFER_READ_BIT;
constexpr VkAccessFlags kWrites =
    VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT;
constexpr VkPipelineStageFlags kStages =
    VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT;

}  // namespace

Stream::Stream(VkDevice device, VkQueue queue, uint32_t queue_family, Memory& memory)
    : device_(device), queue_(queue), memory_(memory) {
  VkCommandPoolCreateInfo pool{VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO};
  pool.queueFamilyIndex = queue_family;
  pool.flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT;
  LLMC_CHECK(vkCreateCommandPool(device, &pool, nullptr, &pool_));
  VkCommandBufferAllocateInfo allocate{VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO};
  allocate.commandPool = pool_;
  allocate.commandBufferCount = 1;
  for (Batch& batch : batches_) {
    LLMC_CHECK(vkAllocateCommandBuffers(device, &allocate, &batch.commands));
  }
  VkSemaphoreTypeCreateInfo type{VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO};
  type.semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE;
  VkSemaphoreCreateInfo semaphore{VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO, &type};
  LLMC_CHECK(vkCreateSemaphore(device, &semaphore, nullptr, &semaphore_));
  arguments_ = memory.MakeHostBlock(kArgumentBytes * kNumBatches, false);
}

Stream::~Stream() {
  memory_.Destroy(*arguments_);
  if (staging_) memory_.Destroy(*staging_);
  vkDestroySemaphore(device_, semaphore_, nullptr);
  vkDestroyCommandPool(device_, pool_, nullptr);
}

void Stream::CheckAlive() {
  if (lost_) {
    TVM_FFI_THROW(RuntimeError) << "Vulkan: VK_ERROR_DEVICE_LOST: the device failed or was reset";
  }
}

void Stream::Run(VkResult result, const char* what) {
  lost_ = lost_ || result == VK_ERROR_DEVICE_LOST;
  Check(result, what);
}

VkCommandBuffer Stream::Record() {
  CheckAlive();
  Batch& batch = batches_[current_];
  if (!is_open_) {
    WaitFor(batch.serial);
    LLMC_CHECK(vkResetCommandBuffer(batch.commands, 0));
    VkCommandBufferBeginInfo begin{VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO};
    begin.flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT;
    LLMC_CHECK(vkBeginCommandBuffer(batch.commands, &begin));
    batch.num_commands = 0;
    batch.argument_bytes = 0;
    is_open_ = true;
  }
  return batch.commands;
}

void Stream::Barrier() {
  VkMemoryBarrier barrier{VK_STRUCTURE_TYPE_MEMORY_BARRIER};
  barrier.srcAccessMask = kWrites;
  barrier.dstAccessMask = kReads | kWrites;
  vkCmdPipelineBarrier(batches_[current_].commands, kStages, kStages, 0, 1, &barrier, 0, nullptr, 0,
                       nullptr);
}

void Stream::Submit() {
  if (!is_open_) return;
  CheckAlive();
  Batch& batch = batches_[current_];
  VkMemoryBarrier to_host{VK_STRUCTURE_TYPE_MEMORY_BARRIER};
  to_host.srcAccessMask = kWrites;
  to_host.dstAccessMask = VK_ACCESS_HOST_READ_BIT;
  vkCmdPipelineBarrier(batch.commands, kStages, VK_PIPELINE_STAGE_HOST_BIT, 0, 1, &to_host, 0,
                       nullptr, 0, nullptr);
  LLMC_CHECK(vkEndCommandBuffer(batch.commands));
  uint64_t serial = submitted_ + 1;
  VkTimelineSemaphoreSubmitInfo timeline{VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO};
  timeline.signalSemaphoreValueCount = 1;
  timeline.pSignalSemaphoreValues = &serial;
  VkSubmitInfo submit{VK_STRUCTURE_TYPE_SUBMIT_INFO, &timeline};
  submit.commandBufferCount = 1;
  submit.pCommandBuffers = &batch.commands;
  submit.signalSemaphoreCount = 1;
  submit.pSignalSemaphores = &semaphore_;
  is_open_ = false;
  Run(vkQueueSubmit(queue_, 1, &submit, VK_NULL_HANDLE), "vkQueueSubmit");
  submitted_ = batch.serial = serial;
  current_ = (current_ + 1) % kNumBatches;
}

void Stream::WaitFor(uint64_t serial) {
  if (serial <= completed_) return;
  CheckAlive();
  VkSemaphoreWaitInfo wait{VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO};
  wait.semaphoreCount = 1;
  wait.pSemaphores = &semaphore_;
  wait.pValues = &serial;
  Run(vkWaitSemaphores(device_, &wait, UINT64_MAX), "vkWaitSemaphores");
  completed_ = serial;
}

void Stream::Sync() {
  Submit();
  WaitFor(submitted_);
  CheckAlive();
  staging_used_ = 0;
  memory_.ReleaseRetired();
}

void Stream::Dispatch(VkPipeline pipeline, VkPipelineLayout layout, const uint64_t* slots,
                      size_t num_slots, bool in_buffer, const uint32_t (&grid)[3]) {
  uint64_t bytes = num_slots * sizeof(uint64_t);
  VkCommandBuffer commands = Record();
  if (in_buffer && batches_[current_].argument_bytes + bytes > kArgumentBytes) {
    Submit();
    commands = Record();
  }
  Batch& batch = batches_[current_];
  vkCmdBindPipeline(commands, VK_PIPELINE_BIND_POINT_COMPUTE, pipeline);
  uint64_t address = 0;
  if (in_buffer) {
    uint64_t offset = current_ * kArgumentBytes + batch.argument_bytes;
    std::memcpy(arguments_->mapped + offset, slots, bytes);
    address = arguments_->address + offset;
    batch.argument_bytes += bytes;
    slots = &address;
    bytes = sizeof(address);
  }
  vkCmdPushConstants(commands, layout, VK_SHADER_STAGE_COMPUTE_BIT, 0,
                     static_cast<uint32_t>(bytes), slots);
  vkCmdDispatch(commands, grid[0], grid[1], grid[2]);
  Barrier();
  if (++batch.num_commands == kCommandsPerBatch) Submit();
}

void Stream::CopyOnDevice(uint64_t from, uint64_t to, uint64_t bytes) {
  if (bytes == 0) return;
  Place source = memory_.Find(from, bytes), target = memory_.Find(to, bytes);
  VkBufferCopy region{source.offset, target.offset, bytes};
  vkCmdCopyBuffer(Record(), source.block->buffer, target.block->buffer, 1, &region);
  Barrier();
}

uint64_t Stream::Staging(uint64_t bytes) {
  if (!staging_) staging_ = memory_.MakeHostBlock(2 * kStagingBytes, true);
  if (staging_used_ + bytes > kStagingBytes) {
    Submit();
    staging_serials_[staging_half_] = submitted_;
    staging_half_ ^= 1;
    staging_used_ = 0;
    WaitFor(staging_serials_[staging_half_]);
  }
  uint64_t offset = staging_half_ * kStagingBytes + staging_used_;
  staging_used_ += bytes;
  return offset;
}

void Stream::CopyToDevice(const char* from, uint64_t to, uint64_t bytes) {
  if (bytes == 0) return;
  Place target = memory_.Find(to, bytes);
  if (target.block->mapped != nullptr) {
    Sync();
    std::memcpy(target.block->mapped + target.offset, from, bytes);
    return;
  }
  for (uint64_t done = 0; done < bytes;) {
    uint64_t part = std::min(bytes - done, kStagingBytes);
    uint64_t offset = Staging(part);
    std::memcpy(staging_->mapped + offset, from + done, part);
    VkBufferCopy region{offset, target.offset + done, part};
    vkCmdCopyBuffer(Record(), staging_->buffer, target.block->buffer, 1, &region);
    Barrier();
    done += part;
  }
}

void Stream::CopyToHost(uint64_t from, char* to, uint64_t bytes) {
  if (bytes == 0) return;
  Place source = memory_.Find(from, bytes);
  if (source.block->mapped != nullptr && memory_.reads_mapped()) {
    Sync();
    std::memcpy(to, source.block->mapped + source.offset, bytes);
    return;
  }
  for (uint64_t done = 0; done < bytes;) {
    uint64_t part = std::min(bytes - done, kStagingBytes);
    uint64_t offset = Staging(part);
    VkBufferCopy region{source.offset + done, offset, part};
    vkCmdCopyBuffer(Record(), source.block->buffer, staging_->buffer, 1, &region);
    Barrier();
    Sync();
    std::memcpy(to + done, staging_->mapped + offset, part);
    done += part;
  }
}

}  // namespace llmc::vulkan
