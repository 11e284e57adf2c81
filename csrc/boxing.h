// HT_BOX(f): the form in which torch's dispatcher calls f, a function that returns a Tensor or a tuple of them and
// takes const Tensor&, const OptionalTensor&, const std::vector<Tensor>&, const std::string&, int64_t, double and bool.
// Like TORCH_BOX, but handles move in and out uncounted.
#pragma once
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor.h"

namespace handtuned::boxing {

// An argument taken off the stack; tensors arrive owned.
template <class T>
T take(StableIValue value) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  } else if constexpr (std::is_same_v<T, OptionalTensor>) {
    auto* boxed = torch::stable::detail::to<StableIValue*>(value);  // nullptr for None, else ours to delete
    if (!boxed) return std::nullopt;
    OptionalTensor tensor(take<Tensor>(*boxed));
    delete boxed;
    return tensor;
  } else if constexpr (std::is_same_v<T, std::vector<Tensor>>) {
    auto list = torch::stable::detail::to<StableListHandle>(value);  // ours to delete
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    std::vector<Tensor> tensors;
    tensors.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      tensors.push_back(take<Tensor>(item));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    return tensors;
  } else {
    return torch::stable::detail::to<T>(value);
  }
}

inline void give(StableIValue* stack, Tensor& result) { stack[0] = torch::stable::detail::from(result.release()); }

template <class... Results>
void give(StableIValue* stack, std::tuple<Results...>& results) {
  std::apply([&](auto&... result) { (give(stack++, result), ...); }, results);
}

template <auto function>
struct Box;

template <class Result, class... Args, Result (*function)(Args...)>
struct Box<function> {
  static void call(StableIValue* stack, uint64_t, uint64_t) { call_with(stack, std::index_sequence_for<Args...>{}); }

  template <size_t... I>
  static void call_with(StableIValue* stack, std::index_sequence<I...>) {
    std::tuple<std::decay_t<Args>...> args{take<std::decay_t<Args>>(stack[I])...};
    Result result = function(std::get<I>(args)...);
    give(stack, result);
  }
};

}  // namespace handtuned::boxing

#define HT_BOX(function) &handtuned::boxing::Box<&function>::call
