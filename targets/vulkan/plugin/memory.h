// Device memory: large blocks from the driver, cut into what tensors ask for.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "vulkan_api.h"

namespace llmc::vulkan {

struct DeviceInfo;

// One allocation of the driver with one buffer over all of it.
struct Block {
  VkBuffer buffer = VK_NULL_HANDLE;
  VkDeviceMemory memory = VK_NULL_HANDLE;
  uint64_t bytes = 0;
  uint64_t address = 0;    // on the device
  char* mapped = nullptr;  // where the host can write it
  std::map<uint64_t, uint64_t> free;  // offsets and sizes of what is not in use
};

// A place in a block.
struct Place {
  Block* block;
  uint64_t offset;
};

class Memory {
 public:
  Memory(VkDevice device, const DeviceInfo& info);
  ~Memory();

  // Addresses on the device, multiples of 256; throws RuntimeError where memory is short.
  uint64_t Allocate(uint64_t bytes);

  // What commands still use stays valid: a range is reused in the order of the stream, and blocks
  // are kept until ReleaseRetired.
  void Free(uint64_t address);

  // Gives blocks that were freed back to the driver; the device must be idle.
  void ReleaseRetired();
  bool has_retired() const { return !retired_.empty(); }

  // Where an address lies; throws ValueError where `bytes` there are not all allocated.
  Place Find(uint64_t address, uint64_t bytes) const;

  // Bytes from `address` to the end of its allocation.
  uint64_t BytesFrom(uint64_t address) const;

  // A block of its own that the host can write (and read fast where `cached`).
  std::unique_ptr<Block> MakeHostBlock(uint64_t bytes, bool cached);
  void Destroy(Block& block);

  bool reads_mapped() const { return reads_mapped_; }
  bool has_huge() const { return num_huge_ > 0; }  // allocations of 2³¹ bytes or more

 private:
  std::unique_ptr<Block> MakeBlock(uint64_t bytes, uint32_t type, bool map);
  uint32_t DeviceType() const;
  uint32_t HostType(bool cached) const;

  VkDevice device_;
  const DeviceInfo& info_;
  VkPhysicalDeviceMemoryProperties types_{};
  uint32_t device_type_ = 0;
  bool maps_ = false;          // device memory is mapped
  bool reads_mapped_ = false;  // and reading it by the host is fast
  uint64_t num_huge_ = 0;
  std::map<uint64_t, std::unique_ptr<Block>> blocks_;  // by address
  std::map<uint64_t, uint64_t> used_;                  // addresses and sizes of allocations
  std::vector<std::unique_ptr<Block>> retired_;
};

}  // namespace llmc::vulkan
