#include "device.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include <unistd.h>

namespace llmc::vulkan {
namespace {

constexpr uint32_t kThreadLimits[] = {128, 256, 512, 1024};
constexpr uint32_t kSharedLimits[] = {16384, 32768, 49152, 65536, 98304};

// The features that kernels may need, in the structures that Vulkan asks and enables them with.
struct Features {
  VkPhysicalDeviceFeatures2 base{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2};
  VkPhysicalDeviceVulkan11Features v11{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES};
  VkPhysicalDeviceVulkan12Features v12{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES};

  Features() {
    base.pNext = &v11;
    v11.pNext = &v12;
  }
  Features(const Features&) = delete;

  struct Entry {
    const char* name;
    VkBool32* value;
    bool needed;  // by every kernel
  };
  std::vector<Entry> Entries() {
    return {
        {"bufferDeviceAddress", &v12.bufferDeviceAddress, true},
        {"scalarBlockLayout", &v12.scalarBlockLayout, true},
        {"timelineSemaphore", &v12.timelineSemaphore, true},
        {"shaderFloat16", &v12.shaderFloat16, false},
        {"shaderFloat64", &base.features.shaderFloat64, false},
        {"shaderInt8", &v12.shaderInt8, false},
        {"shaderInt16", &base.features.shaderInt16, false},
        {"shaderInt64", &base.features.shaderInt64, false},
        {"shaderSubgroupExtendedTypes", &v12.shaderSubgroupExtendedTypes, false},
        {"storageBuffer8BitAccess", &v12.storageBuffer8BitAccess, false},
        {"storageBuffer16BitAccess", &v11.storageBuffer16BitAccess, false},
        {"vulkanMemoryModel", &v12.vulkanMemoryModel, false},
    };
  }
};

void AddSubgroupFeatures(VkSubgroupFeatureFlags operations, std::vector<std::string>& features) {
  const std::pair<VkSubgroupFeatureFlagBits, const char*> names[] = {
      {VK_SUBGROUP_FEATURE_BASIC_BIT, "subgroupBasic"},
      {VK_SUBGROUP_FEATURE_VOTE_BIT, "subgroupVote"},
      {VK_SUBGROUP_FEATURE_ARITHMETIC_BIT, "subgroupArithmetic"},
      {VK_SUBGROUP_FEATURE_BALLOT_BIT, "subgroupBallot"},
      {VK_SUBGROUP_FEATURE_SHUFFLE_BIT, "subgroupShuffle"},
      {VK_SUBGROUP_FEATURE_SHUFFLE_RELATIVE_BIT, "subgroupShuffleRelative"},
      {VK_SUBGROUP_FEATURE_CLUSTERED_BIT, "subgroupClustered"},
  };
  for (auto& [bit, name] : names) {
    if (operations & bit) features.push_back(name);
  }
}

bool HasExtension(VkPhysicalDevice physical, const char* name) {
  uint32_t count = 0;
  vkEnumerateDeviceExtensionProperties(physical, nullptr, &count, nullptr);
  std::vector<VkExtensionProperties> found(count);
  vkEnumerateDeviceExtensionProperties(physical, nullptr, &count, found.data());
  return std::any_of(found.begin(), found.end(),
                     [&](auto& e) { return std::strcmp(e.extensionName, name) == 0; });
}

// Whether subgroups multiply 16 × 16 matrices of float16 and add float32: one shape for all
// kernels, which the drivers of NVIDIA's and AMD's GPUs have in common.
bool HasMatrices(VkInstance instance, VkPhysicalDevice physical) {
  namespace matrix = cooperative_matrix;
  if (!HasExtension(physical, matrix::kExtension)) return false;
  auto get = reinterpret_cast<matrix::GetProperties>(vkGetInstanceProcAddr(
      instance, "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR"));
  matrix::Features features;
  VkPhysicalDeviceFeatures2 asked{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, &features};
  vkGetPhysicalDeviceFeatures2(physical, &asked);
  uint32_t count = 0;
  if (!features.cooperativeMatrix || get == nullptr ||
      get(physical, &count, nullptr) != VK_SUCCESS) {
    return false;
  }
  std::vector<matrix::Properties> found(count);
  if (get(physical, &count, found.data()) != VK_SUCCESS) return false;
  return std::any_of(found.begin(), found.end(), [](const matrix::Properties& p) {
    return p.MSize == 16 && p.NSize == 16 && p.KSize == 16 && p.AType == matrix::kFloat16 &&
           p.BType == matrix::kFloat16 && p.CType == matrix::kFloat32 &&
           p.ResultType == matrix::kFloat32 && p.scope == matrix::kSubgroup;
  });
}

// The sizes that a pipeline may ask of its subgroups; {0, 0} where it may not.
std::pair<uint32_t, uint32_t> SubgroupSizes(VkPhysicalDevice physical) {
  if (!HasExtension(physical, VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME)) return {0, 0};
  VkPhysicalDeviceSubgroupSizeControlFeaturesEXT features{
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES_EXT};
  VkPhysicalDeviceFeatures2 asked{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, &features};
  vkGetPhysicalDeviceFeatures2(physical, &asked);
  VkPhysicalDeviceSubgroupSizeControlPropertiesEXT sizes{
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES_EXT};
  VkPhysicalDeviceProperties2 properties{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, &sizes};
  vkGetPhysicalDeviceProperties2(physical, &properties);
  bool controlled = features.subgroupSizeControl && features.computeFullSubgroups &&
                    (sizes.requiredSubgroupSizeStages & VK_SHADER_STAGE_COMPUTE_BIT);
  if (!controlled) return {0, 0};
  return {sizes.minSubgroupSize, sizes.maxSubgroupSize};
}

// A family of queues that computes; -1 where there is none.
int QueueFamily(VkPhysicalDevice physical) {
  uint32_t count = 0;
  vkGetPhysicalDeviceQueueFamilyProperties(physical, &count, nullptr);
  std::vector<VkQueueFamilyProperties> families(count);
  vkGetPhysicalDeviceQueueFamilyProperties(physical, &count, families.data());
  for (uint32_t i = 0; i < count; ++i) {
    if (families[i].queueFlags & VK_QUEUE_COMPUTE_BIT) return static_cast<int>(i);
  }
  return -1;
}

DeviceInfo Describe(VkInstance instance, VkPhysicalDevice physical) {
  DeviceInfo info;
  info.physical = physical;
  VkPhysicalDeviceVulkan11Properties v11{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES};
  VkPhysicalDeviceProperties2 properties{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, &v11};
  vkGetPhysicalDeviceProperties2(physical, &properties);
  info.properties = properties.properties;
  info.subgroup_size = v11.subgroupSize;
  info.max_allocation_bytes = v11.maxMemoryAllocationSize;
  info.has_memory_budget = HasExtension(physical, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
  Features features;
  vkGetPhysicalDeviceFeatures2(physical, &features.base);
  for (const Features::Entry& entry : features.Entries()) {
    if (*entry.value) {
      info.features.push_back(entry.name);
    } else if (entry.needed) {
      info.missing.push_back(entry.name);
    }
  }
  if (v11.subgroupSupportedStages & VK_SHADER_STAGE_COMPUTE_BIT) {
    AddSubgroupFeatures(v11.subgroupSupportedOperations, info.features);
    auto [smallest, largest] = SubgroupSizes(physical);
    info.controls_subgroups = smallest > 0;
    if (smallest == 0) smallest = largest = v11.subgroupSize;
    for (uint32_t size = smallest; size <= largest; size *= 2) {
      info.features.push_back("subgroupSize" + std::to_string(size));
    }
  }
  info.has_matrices = HasMatrices(instance, physical);
  if (info.has_matrices) info.features.push_back("cooperativeMatrix16x16x16");
  for (uint32_t limit : kThreadLimits) {
    if (limit <= info.properties.limits.maxComputeWorkGroupInvocations) {
      info.features.push_back("threads" + std::to_string(limit));
    }
  }
  for (uint32_t limit : kSharedLimits) {
    if (limit <= info.properties.limits.maxComputeSharedMemorySize) {
      info.features.push_back("shared" + std::to_string(limit));
    }
  }
  return info;
}

// $XDG_CACHE_HOME/llmc/vulkan/<driver's id>.bin, or "" where there is no such place.
std::string PipelineCachePath(const VkPhysicalDeviceProperties& properties) {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  std::filesystem::path folder;
  if (cache != nullptr && cache[0] == '/') {
    folder = cache;
  } else if (home != nullptr && home[0] == '/') {
    folder = std::filesystem::path(home) / ".cache";
  } else {
    return "";
  }
  std::string name;
  for (uint8_t byte : properties.pipelineCacheUUID) {
    char text[3];
    std::snprintf(text, sizeof(text), "%02x", byte);
    name += text;
  }
  return (folder / "llmc" / "vulkan" / (name + ".bin")).string();
}

VkPhysicalDeviceMemoryProperties2 MemoryProperties(const DeviceInfo& info, void* next) {
  VkPhysicalDeviceMemoryProperties2 found{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2,
                                          next};
  vkGetPhysicalDeviceMemoryProperties2(info.physical, &found);
  return found;
}

// The largest device-local heap.
uint32_t MainHeap(const VkPhysicalDeviceMemoryProperties& memory) {
  uint32_t best = 0;
  uint64_t largest = 0;
  for (uint32_t i = 0; i < memory.memoryHeapCount; ++i) {
    const VkMemoryHeap& heap = memory.memoryHeaps[i];
    if ((heap.flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) && heap.size > largest) {
      best = i;
      largest = heap.size;
    }
  }
  return best;
}

}  // namespace

uint64_t DeviceInfo::HeapBytes() const {
  auto memory = MemoryProperties(*this, nullptr).memoryProperties;
  return memory.memoryHeaps[MainHeap(memory)].size;
}

uint64_t DeviceInfo::FreeBytes() const {
  if (!has_memory_budget) return HeapBytes();
  VkPhysicalDeviceMemoryBudgetPropertiesEXT budget{
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
  auto memory = MemoryProperties(*this, &budget).memoryProperties;
  uint32_t heap = MainHeap(memory);
  uint64_t all = budget.heapBudget[heap], used = budget.heapUsage[heap];
  return all > used ? all - used : 0;
}

Device::Device(const DeviceInfo& device_info) : info(device_info) {
  Features wanted;
  vkGetPhysicalDeviceFeatures2(info.physical, &wanted.base);
  // Only what kernels may need: some features cost speed when they are enabled.
  Features enabled;
  auto from = wanted.Entries(), to = enabled.Entries();
  for (size_t i = 0; i < from.size(); ++i) *to[i].value = *from[i].value;
  float priority = 1.0f;
  VkDeviceQueueCreateInfo queues{VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO};
  queues.queueFamilyIndex = info.queue_family;
  queues.queueCount = 1;
  queues.pQueuePriorities = &priority;
  std::vector<const char*> extensions;
  cooperative_matrix::Features matrices;
  VkPhysicalDeviceSubgroupSizeControlFeaturesEXT subgroups{
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES_EXT};
  if (info.has_matrices) {
    extensions.push_back(cooperative_matrix::kExtension);
    matrices.cooperativeMatrix = VK_TRUE;
    matrices.pNext = std::exchange(enabled.v12.pNext, &matrices);
  }
  if (info.controls_subgroups) {
    extensions.push_back(VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME);
    subgroups.subgroupSizeControl = subgroups.computeFullSubgroups = VK_TRUE;
    subgroups.pNext = std::exchange(enabled.v12.pNext, &subgroups);
  }
  VkDeviceCreateInfo create{VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO, &enabled.base};
  create.enabledExtensionCount = static_cast<uint32_t>(extensions.size());
  create.ppEnabledExtensionNames = extensions.data();
  create.queueCreateInfoCount = 1;
  create.pQueueCreateInfos = &queues;
  LLMC_CHECK(vkCreateDevice(info.physical, &create, nullptr, &handle));
  vkGetDeviceQueue(handle, info.queue_family, 0, &queue);
  memory = std::make_unique<Memory>(handle, info);
  stream = std::make_unique<Stream>(handle, queue, info.queue_family, *memory);
  OpenPipelineCache();
}

Device::~Device() {
  vkDeviceWaitIdle(handle);
  SavePipelineCache();
  for (Pipeline& pipeline : pipelines_) {
    vkDestroyPipeline(handle, pipeline.pipeline, nullptr);
    vkDestroyPipelineLayout(handle, pipeline.layout, nullptr);
  }
  vkDestroyPipelineCache(handle, cache_, nullptr);
  stream.reset();
  memory.reset();
  vkDestroyDevice(handle, nullptr);
}

void Device::OpenPipelineCache() {
  cache_path_ = PipelineCachePath(info.properties);
  std::ifstream file(cache_path_, std::ios::binary);
  std::string data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  VkPipelineCacheCreateInfo create{VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO};
  create.initialDataSize = data.size();
  create.pInitialData = data.data();
  // A driver ignores what is not its own; it may refuse what is damaged.
  if (vkCreatePipelineCache(handle, &create, nullptr, &cache_) != VK_SUCCESS) {
    create.initialDataSize = 0;
    LLMC_CHECK(vkCreatePipelineCache(handle, &create, nullptr, &cache_));
  }
}

void Device::SavePipelineCache() {
  if (!cache_has_grown_ || cache_path_.empty()) return;
  size_t bytes = 0;
  if (vkGetPipelineCacheData(handle, cache_, &bytes, nullptr) != VK_SUCCESS) return;
  std::string data(bytes, '\0');
  if (vkGetPipelineCacheData(handle, cache_, &bytes, data.data()) != VK_SUCCESS) return;
  // It saves time and is nothing that has to be there: what goes wrong is not worth a message.
  std::error_code error;
  std::filesystem::path path = cache_path_;
  std::filesystem::create_directories(path.parent_path(), error);
  std::filesystem::path fresh = path.string() + "." + std::to_string(getpid());
  std::ofstream(fresh, std::ios::binary).write(data.data(), static_cast<std::streamsize>(bytes));
  std::filesystem::rename(fresh, path, error);
}

Device::Pipeline Device::MakePipeline(const std::string& name, const std::string& code,
                                      uint32_t push_bytes, Subgroups subgroups) {
  VkShaderModuleCreateInfo shader{VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO};
  std::vector<uint32_t> words(code.size() / 4);  // aligned, as Vulkan wants them
  std::memcpy(words.data(), code.data(), words.size() * 4);
  shader.codeSize = words.size() * 4;
  shader.pCode = words.data();
  VkShaderModule module = VK_NULL_HANDLE;
  LLMC_CHECK(vkCreateShaderModule(handle, &shader, nullptr, &module));
  Pipeline made;
  VkPushConstantRange range{VK_SHADER_STAGE_COMPUTE_BIT, 0, push_bytes};
  VkPipelineLayoutCreateInfo layout{VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO};
  layout.pushConstantRangeCount = 1;
  layout.pPushConstantRanges = &range;
  VkResult result = vkCreatePipelineLayout(handle, &layout, nullptr, &made.layout);
  if (result == VK_SUCCESS) {
    VkComputePipelineCreateInfo create{VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO};
    create.stage = {VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO};
    create.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
    create.stage.module = module;
    create.stage.pName = "main";
    VkPipelineShaderStageRequiredSubgroupSizeCreateInfoEXT size{
        VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO_EXT};
    size.requiredSubgroupSize = subgroups.threads;
    if (subgroups.threads > 1 && info.controls_subgroups) {
      create.stage.pNext = &size;
      if (subgroups.are_full) {
        create.stage.flags = VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT_EXT;
      }
    }
    create.layout = made.layout;
    result = vkCreateComputePipelines(handle, cache_, 1, &create, nullptr, &made.pipeline);
  }
  vkDestroyShaderModule(handle, module, nullptr);
  if (result != VK_SUCCESS) {
    vkDestroyPipelineLayout(handle, made.layout, nullptr);
    Check(result, ("vkCreateComputePipelines(" + name).c_str());
  }
  cache_has_grown_ = true;
  pipelines_.push_back(made);
  return made;
}

Devices& Devices::Get() {
  // Never destroyed: tensors may be freed after every destructor has run.
  static Devices* devices = new Devices();
  return *devices;
}

Devices::Devices() {
  problem_ = LoadLibrary();
  if (!problem_.empty()) return;
  uint32_t version = 0;
  vkEnumerateInstanceVersion(&version);
  VkApplicationInfo application{VK_STRUCTURE_TYPE_APPLICATION_INFO};
  application.pApplicationName = "llmc";
  application.apiVersion = VK_API_VERSION_1_2;
  VkInstanceCreateInfo create{VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO};
  create.pApplicationInfo = &application;
  VkResult result = version < VK_API_VERSION_1_2 ? VK_ERROR_INCOMPATIBLE_DRIVER
                                                 : vkCreateInstance(&create, nullptr, &instance_);
  if (result != VK_SUCCESS) {
    problem_ = "no Vulkan 1.2 driver is installed (" + ResultName(result) + ")";
    return;
  }
  problem_ = LoadFunctions(instance_);
  if (!problem_.empty()) return;
  uint32_t count = 0;
  vkEnumeratePhysicalDevices(instance_, &count, nullptr);
  std::vector<VkPhysicalDevice> found(count);
  vkEnumeratePhysicalDevices(instance_, &count, found.data());
  for (VkPhysicalDevice physical : found) {
    VkPhysicalDeviceProperties2 properties{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2};
    vkGetPhysicalDeviceProperties2(physical, &properties);
    int family = QueueFamily(physical);
    if (family < 0 || properties.properties.apiVersion < VK_API_VERSION_1_2) continue;
    infos_.push_back(Describe(instance_, physical));
    infos_.back().queue_family = static_cast<uint32_t>(family);
  }
  if (infos_.empty()) problem_ = "no driver offers a device with Vulkan 1.2 that computes";
  auto rank = [](const DeviceInfo& info) {
    switch (info.properties.deviceType) {
      case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU:
        return 0;
      case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU:
        return 1;
      case VK_PHYSICAL_DEVICE_TYPE_CPU:
        return 3;
      default:
        return 2;
    }
  };
  std::stable_sort(infos_.begin(), infos_.end(),
                   [&](auto& a, auto& b) { return rank(a) < rank(b); });
  devices_.resize(infos_.size());
  // Runs before the destructors of the driver, which was loaded before this line.
  std::atexit([] { Devices::Get().Close(); });
}

const DeviceInfo& Devices::info(int index) const {
  if (index < 0 || static_cast<size_t>(index) >= infos_.size()) {
    TVM_FFI_THROW(ValueError) << "Vulkan: there is no device " << index << ", "
                              << (problem_.empty() ? "only " + std::to_string(infos_.size())
                                                   : problem_);
  }
  return infos_[static_cast<size_t>(index)];
}

Device& Devices::Open(int index) {
  const DeviceInfo& wanted = info(index);
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) TVM_FFI_THROW(RuntimeError) << "Vulkan: the process is ending";
  if (!wanted.missing.empty()) {
    std::string names;
    for (const std::string& name : wanted.missing) names += (names.empty() ? "" : ", ") + name;
    TVM_FFI_THROW(RuntimeError) << "Vulkan: VK_ERROR_FEATURE_NOT_PRESENT: "
                                << wanted.properties.deviceName << " lacks " << names;
  }
  std::unique_ptr<Device>& device = devices_[static_cast<size_t>(index)];
  if (!device) device = std::make_unique<Device>(wanted);
  return *device;
}

void Devices::Close() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  for (std::unique_ptr<Device>& device : devices_) {
    if (!device) continue;
    // Another thread may be in the middle of a call; it fails at its next one.
    device->mutex.lock();
    device->mutex.unlock();
    device.reset();
  }
  vkDestroyInstance(instance_, nullptr);
}

}  // namespace llmc::vulkan
