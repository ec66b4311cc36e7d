// The machine's Vulkan devices: found once, opened when they are first used, closed at exit.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"
#include "stream.h"
#include "vulkan_api.h"

namespace llmc::vulkan {

// What can be known of a device without opening it.
struct DeviceInfo {
  VkPhysicalDevice physical = VK_NULL_HANDLE;
  VkPhysicalDeviceProperties properties{};
  uint32_t subgroup_size = 0;
  uint64_t max_allocation_bytes = 0;
  uint32_t queue_family = 0;
  bool has_memory_budget = false;
  bool has_matrices = false;          // cooperative matrices of the shape that kernels use
  bool controls_subgroups = false;    // a pipeline may say how large its subgroups are
  std::vector<std::string> features;  // Vulkan's names, and limits such as threads256
  std::vector<std::string> missing;   // of what every kernel needs

  uint64_t HeapBytes() const;  // of the largest device-local heap
  uint64_t FreeBytes() const;  // what the driver would still give, or the heap where it is silent
};

class Device {
 public:
  explicit Device(const DeviceInfo& info);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const DeviceInfo& info;
  std::recursive_mutex mutex;  // held by whoever uses what follows
  VkDevice handle = VK_NULL_HANDLE;
  VkQueue queue = VK_NULL_HANDLE;
  std::unique_ptr<Memory> memory;
  std::unique_ptr<Stream> stream;

  // What a kernel presumes of its subgroups.
  struct Subgroups {
    uint32_t threads = 1;   // 1: any number
    bool are_full = false;  // Vulkan asks it of workgroups whose x is a multiple of `threads`
  };

  // A pipeline of the kernel `code`, `push_bytes` of push constants; made once for each kernel.
  struct Pipeline {
    VkPipelineLayout layout = VK_NULL_HANDLE;
    VkPipeline pipeline = VK_NULL_HANDLE;
  };
  Pipeline MakePipeline(const std::string& name, const std::string& code, uint32_t push_bytes,
                        Subgroups subgroups);

 private:
  void OpenPipelineCache();
  void SavePipelineCache();

  VkPipelineCache cache_ = VK_NULL_HANDLE;
  std::string cache_path_;
  bool cache_has_grown_ = false;
  std::vector<Pipeline> pipelines_;
};

// All devices of the machine, the fastest kinds first; empty where there is no driver.
class Devices {
 public:
  static Devices& Get();

  const std::string& problem() const { return problem_; }  // why there are none, or ""
  size_t size() const { return infos_.size(); }
  VkInstance instance() const { return instance_; }
  const DeviceInfo& info(int index) const;  // throws ValueError for a wrong index
  Device& Open(int index);                  // throws RuntimeError where it cannot be used
  bool is_closed() const { return closed_; }

 private:
  Devices();
  void Close();

  std::mutex mutex_;
  bool closed_ = false;
  std::string problem_;
  VkInstance instance_ = VK_NULL_HANDLE;
  std::vector<DeviceInfo> infos_;
  std::vector<std::unique_ptr<Device>> devices_;
};

}  // namespace llmc::vulkan
