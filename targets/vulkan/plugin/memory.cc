#include "memory.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdlib>

#include "device.h"

namespace llmc::vulkan {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr uint64_t kBlockBytes = 64ull << 20;
constexpr uint64_t kHugeBytes = 1ull << 31;
constexpr VkMemoryPropertyFlags kMappable =
    VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;

uint64_t RoundUp(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// Puts a range back among the free ones, one with its neighbours.
void AddFree(std::map<uint64_t, uint64_t>& free, uint64_t offset, uint64_t bytes) {
  auto next = free.lower_bound(offset);
  if (next != free.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == offset) {
      offset = before->first;
      bytes += before->second;
      free.erase(before);
    }
  }
  if (next != free.end() && offset + bytes == next->first) {
    bytes += next->second;
    free.erase(next);
  }
  free[offset] = bytes;
}

}  // namespace

Memory::Memory(VkDevice device, const DeviceInfo& info) : device_(device), info_(info) {
  VkPhysicalDeviceMemoryProperties2 found{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
  vkGetPhysicalDeviceMemoryProperties2(info.physical, &found);
  types_ = found.memoryProperties;
  device_type_ = DeviceType();
  VkMemoryPropertyFlags flags = types_.memoryTypes[device_type_].propertyFlags;
  // For tests: copies through staging buffers also where the host could write directly.
  const char* staging = std::getenv("LLMC_VULKAN_STAGING");
  maps_ = (flags & kMappable) == kMappable && (staging == nullptr || staging[0] != '1');
  reads_mapped_ = maps_ && (flags & VK_MEMORY_PROPERTY_HOST_CACHED_BIT) != 0;
}

Memory::~Memory() {
  ReleaseRetired();
  for (auto& entry : blocks_) Destroy(*entry.second);
}

uint32_t Memory::DeviceType() const {
  uint64_t largest = 0;
  for (uint32_t i = 0; i < types_.memoryHeapCount; ++i) {
    if (types_.memoryHeaps[i].flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) {
      largest = std::max<uint64_t>(largest, types_.memoryHeaps[i].size);
    }
  }
  int best = -1, best_score = -1;
  for (uint32_t i = 0; i < types_.memoryTypeCount; ++i) {
    VkMemoryPropertyFlags flags = types_.memoryTypes[i].propertyFlags;
    if (!(flags & VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT)) continue;
    if (types_.memoryHeaps[types_.memoryTypes[i].heapIndex].size < largest) continue;
    // Protected, lazily allocated and device-coherent memory are other things.
    constexpr VkMemoryPropertyFlags kPlain =
        VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT | kMappable | VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
    if (flags & ~kPlain) continue;
    int score = (flags & kMappable) == kMappable ? 1 : 0;
    if (score && (flags & VK_MEMORY_PROPERTY_HOST_CACHED_BIT)) score = 2;
    if (score > best_score) {
      best = static_cast<int>(i);
      best_score = score;
    }
  }
  if (best < 0) TVM_FFI_THROW(RuntimeError) << "Vulkan: the device has no device-local memory";
  return static_cast<uint32_t>(best);
}

uint32_t Memory::HostType(bool cached) const {
  int found = -1;
  for (uint32_t i = 0; i < types_.memoryTypeCount; ++i) {
    VkMemoryPropertyFlags flags = types_.memoryTypes[i].propertyFlags;
    if ((flags & kMappable) != kMappable) continue;
    bool fits = ((flags & VK_MEMORY_PROPERTY_HOST_CACHED_BIT) != 0) == cached;
    if (found < 0 || fits) found = static_cast<int>(i);
    if (fits) break;
  }
  // Vulkan promises one that is host-visible and coherent.
  return static_cast<uint32_t>(found);
}

std::unique_ptr<Block> Memory::MakeBlock(uint64_t bytes, uint32_t type, bool map) {
  auto block = std::make_unique<Block>();
  block->bytes = bytes;
  VkBufferCreateInfo buffer{VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO};
  buffer.size = bytes;
  buffer.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT |
                 VK_BUFFER_USAGE_TRANSFER_DST_BIT | VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT;
  VkResult result = bytes > info_.max_allocation_bytes
                        ? VK_ERROR_OUT_OF_DEVICE_MEMORY
                        : vkCreateBuffer(device_, &buffer, nullptr, &block->buffer);
  VkMemoryRequirements needs{};
  if (result == VK_SUCCESS) vkGetBufferMemoryRequirements(device_, block->buffer, &needs);
  VkMemoryAllocateFlagsInfo flags{VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_FLAGS_INFO};
  flags.flags = VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT;
  VkMemoryAllocateInfo allocate{VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO, &flags};
  allocate.allocationSize = needs.size;
  allocate.memoryTypeIndex = type;
  if (result == VK_SUCCESS && !(needs.memoryTypeBits >> type & 1)) {
    result = VK_ERROR_FEATURE_NOT_PRESENT;
  }
  if (result == VK_SUCCESS) result = vkAllocateMemory(device_, &allocate, nullptr, &block->memory);
  if (result == VK_SUCCESS) result = vkBindBufferMemory(device_, block->buffer, block->memory, 0);
  if (result == VK_SUCCESS && map) {
    void* mapped = nullptr;
    result = vkMapMemory(device_, block->memory, 0, VK_WHOLE_SIZE, 0, &mapped);
    block->mapped = static_cast<char*>(mapped);
  }
  if (result != VK_SUCCESS) {
    Destroy(*block);
    TVM_FFI_THROW(RuntimeError)
        << "Vulkan: " << ResultName(result) << ": " << bytes << " bytes asked of "
        << info_.properties.deviceName << ", which has " << info_.HeapBytes() << " in all and "
        << info_.FreeBytes() << " free";
  }
  VkBufferDeviceAddressInfo address{VK_STRUCTURE_TYPE_BUFFER_DEVICE_ADDRESS_INFO};
  address.buffer = block->buffer;
  block->address = vkGetBufferDeviceAddress(device_, &address);
  return block;
}

std::unique_ptr<Block> Memory::MakeHostBlock(uint64_t bytes, bool cached) {
  return MakeBlock(bytes, HostType(cached), true);
}

void Memory::Destroy(Block& block) {
  vkDestroyBuffer(device_, block.buffer, nullptr);
  vkFreeMemory(device_, block.memory, nullptr);
}

uint64_t Memory::Allocate(uint64_t bytes) {
  bytes = RoundUp(std::max<uint64_t>(bytes, 1), kAlignment);
  for (auto& entry : blocks_) {
    std::map<uint64_t, uint64_t>& free = entry.second->free;
    auto fit = std::find_if(free.begin(), free.end(), [&](auto& f) { return f.second >= bytes; });
    if (fit == free.end()) continue;
    auto [offset, available] = *fit;
    free.erase(fit);
    if (available > bytes) free[offset + bytes] = available - bytes;
    used_[entry.first + offset] = bytes;
    return entry.first + offset;
  }
  // What is half a block or larger gets one of its own, which goes back when it is freed.
  bool dedicated = bytes > kBlockBytes / 2;
  auto block = MakeBlock(dedicated ? bytes : kBlockBytes, device_type_, maps_);
  uint64_t address = block->address;
  if (!dedicated) block->free[bytes] = kBlockBytes - bytes;
  used_[address] = bytes;
  num_huge_ += bytes >= kHugeBytes;
  blocks_[address] = std::move(block);
  return address;
}

void Memory::Free(uint64_t address) {
  auto found = used_.find(address);
  if (found == used_.end()) {
    TVM_FFI_THROW(ValueError) << "Vulkan: freed an address that was not allocated: " << address;
  }
  uint64_t bytes = found->second;
  used_.erase(found);
  num_huge_ -= bytes >= kHugeBytes;
  auto owner = std::prev(blocks_.upper_bound(address));
  Block& block = *owner->second;
  AddFree(block.free, address - block.address, bytes);
  bool empty = block.free.begin()->second == block.bytes;
  if (empty && block.bytes != kBlockBytes) {
    retired_.push_back(std::move(owner->second));
    blocks_.erase(owner);
  }
}

void Memory::ReleaseRetired() {
  for (auto& block : retired_) Destroy(*block);
  retired_.clear();
}

Place Memory::Find(uint64_t address, uint64_t bytes) const {
  uint64_t available = BytesFrom(address);
  if (bytes > available) {
    TVM_FFI_THROW(ValueError) << "Vulkan: " << bytes << " bytes at an address where " << available
                              << " are allocated";
  }
  Block* block = std::prev(blocks_.upper_bound(address))->second.get();
  return {block, address - block->address};
}

uint64_t Memory::BytesFrom(uint64_t address) const {
  auto found = used_.upper_bound(address);
  if (found == used_.begin()) return 0;
  --found;
  uint64_t end = found->first + found->second;
  return address < end ? end - address : 0;
}

}  // namespace llmc::vulkan
