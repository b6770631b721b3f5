// Running a kernel over all blocks of a grid.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "hostcuda/options.h"

namespace hostcuda {

// A kernel with its arguments, bound to one parameterless function for each thread to run.
struct BoundKernel {
  void (*call)(const void* kernel, void** arguments);
  const void* kernel;
  void** arguments;
};

// Returns null, or what went wrong; the text lives until the next launch.
const char* launch(const Options& options, const BoundKernel& kernel);
const char* check_arguments(int expected, const size_t* expected_sizes, int given, const size_t* given_sizes);

template <class... Parameters, size_t... kIndices>
void call_kernel(void (*kernel)(Parameters...), [[maybe_unused]] void** arguments, std::index_sequence<kIndices...>) {
  kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[kIndices])...);
}

// As cuLaunchKernel: one pointer to the value of each argument.
template <class... Parameters>
const char* launch_kernel(void (*kernel)(Parameters...), const Options& options, int num_arguments,
                          const size_t* argument_sizes, void** arguments) {
  constexpr size_t kSizes[] = {sizeof(Parameters)..., 0};
  const char* const error = check_arguments(sizeof...(Parameters), kSizes, num_arguments, argument_sizes);
  if (error != nullptr) return error;
  using Kernel = void (*)(Parameters...);
  const auto call = [](const void* kernel, void** arguments) {
    call_kernel(*static_cast<const Kernel*>(kernel), arguments, std::index_sequence_for<Parameters...>());
  };
  return launch(options, {call, &kernel, arguments});
}

}  // namespace hostcuda

// What a compiled kernel exports. To be followed by (kernel) in the generated source.
#define HOSTCUDA_EXPORT(kernel)                                                                              \
  extern "C" __attribute__((visibility("default"))) const char* hostcuda_launch(                             \
      const hostcuda::Options* options, int num_arguments, const size_t* argument_sizes, void** arguments) { \
    return hostcuda::launch_kernel(&kernel, *options, num_arguments, argument_sizes, arguments);             \
  }
