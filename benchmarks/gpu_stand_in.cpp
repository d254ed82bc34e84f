// A stand-in for the CUDA driver, loaded before torch: enough for autograd and FakeTensors on device "cuda".
// What is defined here takes the place of the functions of the same name in torch's libraries; see gpu_stand_in.py.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <driver_types.h>

#include <cstring>

#define SEEN __attribute__((visibility("default")))

extern "C" SEEN int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 0;
  return 0;
}

namespace at::cuda {
SEEN cudaDeviceProp* getDeviceProperties(signed char) {
  static cudaDeviceProp h200{};
  std::strcpy(h200.name, "NVIDIA H200");
  h200.major = 9;
  h200.minor = 0;
  h200.multiProcessorCount = 132;
  h200.warpSize = 32;
  h200.maxThreadsPerMultiProcessor = 2048;
  h200.sharedMemPerBlockOptin = 232448;
  h200.totalGlobalMem = 150ull << 30;
  return &h200;
}
SEEN cudaDeviceProp* getCurrentDeviceProperties() { return getDeviceProperties(0); }
}  // namespace at::cuda

namespace c10::cuda {
SEEN signed char device_count() noexcept { return 1; }
SEEN signed char device_count_ensure_non_zero() { return 1; }
SEEN signed char current_device() { return 0; }
SEEN bool hasPrimaryContext(signed char) { return false; }
SEEN void set_device(signed char, bool) {}
SEEN signed char ExchangeDevice(signed char) { return 0; }
SEEN signed char MaybeExchangeDevice(signed char) { return 0; }
SEEN int GetDevice(signed char* device) {
  *device = 0;
  return 0;
}
}  // namespace c10::cuda

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device device() { return Device(DeviceType::CUDA, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, device()); }
  Device getDevice() const override { return device(); }
  Device exchangeDevice(Device) const override { return device(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override { *event = this_(); }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
  void* this_() const { return const_cast<Guard*>(this); }  // an event is any pointer that is not null
};
}  // namespace

extern "C" SEEN void stand_in() {
  static Guard guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
}
