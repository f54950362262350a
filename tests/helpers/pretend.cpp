// Devices "cuda:0", "cuda:1", ... whose memory is the host's, for a torch that was built without CUDA; as many as the
// environment variable PRETEND_CARDS says, or one.
//
// Their tensors are CUDA tensors to everyone who asks. Every operator runs its CPU kernel on the same memory, through one boxed
// fallback, so values, autograd and control flow are real. Tensors of several devices in one call are an error, as on a card.
// It shows nothing about kernels, streams, speed or memory limits.
#include <ATen/core/Tensor.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

using at::Tensor;

namespace {

const c10::DispatchKeySet CARD_KEYS(c10::DispatchKey::CUDA);
thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex num_cards() {
  static const char* given = std::getenv("PRETEND_CARDS");
  return given ? std::atoi(given) : 1;
}

c10::Device card(c10::DeviceIndex index) { return c10::Device(c10::kCUDA, index < 0 ? current : index); }

c10::DeviceIndex exchange(c10::DeviceIndex index) { return std::exchange(current, index < 0 ? current : index); }

// Each card has one stream, on which everything is done at once.
struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kCUDA;
  CardGuard() = default;
  explicit CardGuard(c10::DeviceType) {}
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override { return card(exchange(device.index())); }
  c10::Device getDevice() const override { return card(current); }
  void setDevice(c10::Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchange(device.index()); }
  c10::Stream getStream(c10::Device device) const noexcept override { return default_of(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return default_of(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return default_of(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return num_cards(); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  static c10::Stream default_of(c10::Device device) { return c10::Stream(c10::Stream::DEFAULT, card(device.index())); }
};
C10_REGISTER_GUARD_IMPL(CUDA, CardGuard)

// The memory of the current card.
struct CardAllocator final : c10::Allocator {
  static void drop(void* memory) { std::free(memory); }
  c10::DataPtr allocate(size_t size) override {
    void* memory = size ? std::aligned_alloc(64, (size + 63) / 64 * 64) : nullptr;
    return {memory, memory, &drop, card(current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
CardAllocator card_memory;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &card_memory)

// Pinned memory of the host: ordinary memory that is remembered.
struct PinnedAllocator final : c10::Allocator {
  static std::set<void*>& blocks() {
    static std::set<void*> held;
    return held;
  }
  static std::mutex& lock() {
    static std::mutex mutex;
    return mutex;
  }
  static void drop(void* memory) {
    std::lock_guard<std::mutex> held(lock());
    blocks().erase(memory);
    std::free(memory);
  }
  static bool holds(const void* memory) {
    std::lock_guard<std::mutex> held(lock());
    return blocks().count(const_cast<void*>(memory)) > 0;
  }
  c10::DataPtr allocate(size_t size) override {
    void* memory = std::aligned_alloc(64, (size + 64) / 64 * 64);
    std::lock_guard<std::mutex> held(lock());
    blocks().insert(memory);
    return {memory, memory, &drop, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
PinnedAllocator pinned_memory;

}  // namespace

namespace at {
// What autograd, autocast and pin_memory ask about the device.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return num_cards(); }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { exchange(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchange(index); }
  DeviceIndex current_device() const override { return current; }
  bool isPinnedPtr(const void* memory) const override { return PinnedAllocator::holds(memory); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {

// The memory of a storage under the name of another device. It lives as long as either.
c10::Storage renamed(c10::Storage storage, c10::Device device, c10::Allocator* allocator) {
  auto* keep = new c10::Storage(storage);
  void* data = const_cast<void*>(storage.data());
  c10::DataPtr pointer(data, keep, [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device);
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), allocator, true};
}

c10::Storage on_card(const Tensor& tensor, c10::DeviceIndex index) {
  return renamed(tensor.storage(), card(index), &card_memory);
}

Tensor like(const Tensor& tensor, c10::Storage storage, c10::DispatchKeySet keys) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  auto* made = result.unsafeGetTensorImpl();
  made->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made->set_wrapped_number(true);
  return result;
}

Tensor to_host(const Tensor& tensor) {
  auto storage = renamed(tensor.storage(), c10::kCPU, c10::GetAllocator(c10::kCPU));
  return like(tensor, std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU));
}

Tensor to_card(const Tensor& tensor, c10::DeviceIndex index) { return like(tensor, on_card(tensor, index), CARD_KEYS); }

// Operators that a card calls with tensors of the host, too: copies, and indices that lie there.
bool takes_tensors_of_the_host(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::copy_", "aten::_copy_from", "aten::index", "aten::set_", "aten::index_put_", "aten::_index_put_impl_"};
  return names.count(name) > 0;
}

// The arguments of one call: the card's tensors become the host's, and are known again in the results.
struct Call {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // on the card, on the host
  std::string host_argument, other_argument;     // a tensor that was given on the host, and one on another card
  c10::DeviceIndex index = -1;                   // the card of the tensors, or one that is named

  Tensor to(const Tensor& tensor, const std::string& name, bool in_list) {
    if (!tensor.defined()) return tensor;
    if (!tensor.device().is_cuda()) {
      // A card takes numbers of the host, that is tensors without dimensions, but not among the tensors of a list.
      if (tensor.device().is_cpu() && (tensor.dim() > 0 || in_list)) host_argument = name;
      return tensor;
    }
    for (auto& [given, host] : pairs)
      if (given.is_same(tensor)) return host;
    if (!pairs.empty() && pairs[0].first.device() != tensor.device()) other_argument = name;
    index = tensor.device().index();
    pairs.emplace_back(tensor, to_host(tensor));
    return pairs.back().second;
  }

  Tensor back(const Tensor& tensor) const {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (const auto& [given, host] : pairs)
      if (host.is_same(tensor)) return given;
    return index < 0 ? tensor : to_card(tensor, index);
  }
};

void by_cpu_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t num_arguments = schema.arguments().size(), num_returns = schema.returns().size();
  Call call;
  for (size_t i = 0; i < num_arguments; i++) {
    auto& value = (*stack)[stack->size() - num_arguments + i];
    const auto& name = schema.arguments()[i].name();
    if (value.isTensor()) {
      value = call.to(value.toTensor(), name, false);
    } else if (value.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(call.to(tensor, name, true));
      value = c10::List<Tensor>(tensors);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
        tensors.push_back(tensor ? std::optional<Tensor>(call.to(*tensor, name, true)) : tensor);
      value = tensors;
    } else if (value.isDevice()) {
      if (value.toDevice().is_cuda()) call.index = card(value.toDevice().index()).index();
      value = c10::Device(c10::kCPU);
    }
  }
  TORCH_CHECK(
      call.pairs.empty() || call.host_argument.empty() || takes_tensors_of_the_host(schema.name()),
      "Expected all tensors to be on the same device: ", schema.name(), " got ", call.host_argument,
      " on cpu, and another tensor on ", card(call.index));
  TORCH_CHECK(
      call.other_argument.empty(), "Expected all tensors to be on the same device: ", schema.name(), " got ",
      call.other_argument, " on another card than ", call.pairs[0].first.device());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [given, host] : call.pairs) {  // kernels with an output may have resized it
    if (host.sizes() == given.sizes() && host.strides() == given.strides() && host.storage().data() == given.storage().data())
      continue;
    auto* made = given.unsafeGetTensorImpl();
    made->set_storage_keep_dtype(on_card(host, given.device().index()));
    made->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
  for (size_t i = 0; i < num_returns; i++) {
    auto& value = (*stack)[stack->size() - num_returns + i];
    if (value.isTensor()) {
      value = call.back(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(call.back(tensor));
      value = c10::List<Tensor>(tensors);
    }
  }
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard on(device);
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  return at::detail::empty_generic(sizes, &card_memory, CARD_KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard on(device);
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  return at::detail::empty_strided_generic(sizes, strides, &card_memory, CARD_KEYS, c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {
  auto host_to = to.device().is_cuda() ? to_host(to) : to, host_from = from.device().is_cuda() ? to_host(from) : from;
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  host_to.copy_(host_from);
  return to;
}

Tensor as_strided(const Tensor& x, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(x, size, stride, offset);
}

// The fused kernels are not here: attention is spelled out by torch.
int64_t choose_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu_kernel>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("as_strided", as_strided);
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("_fused_sdp_choice", choose_attention);
}
