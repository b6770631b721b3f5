// Runs one launch in a process of its own: `runner kernel.so`, with the launch on standard input and the regions of
// memory, as they are afterwards, on standard output. Exits with 3 after a failed launch, with its message on standard
// error. Every region is one allocation, so that AddressSanitizer sees its two ends. See child.py for the format.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "hostcuda/options.h"

#ifdef HOSTCUDA_ASAN
extern "C" void __asan_poison_memory_region(const volatile void* address, size_t size);
#endif

namespace {

constexpr int kFailed = 3, kBroken = 4;

// Addresses keep their remainder, because the host chooses kernels and loads by alignment.
constexpr size_t kAlignment = 512;

void read_exactly(void* target, size_t size) {
  if (size > 0 && fread(target, size, 1, stdin) != 1) {
    fprintf(stderr, "runner: the launch ends too early\n");
    exit(kBroken);
  }
}

template <class T>
T read() {
  T value;
  read_exactly(&value, sizeof value);
  return value;
}

struct Region {
  char* data;
  size_t size;
};

Region read_region() {
  const size_t size = read<uint64_t>(), remainder = read<uint64_t>();
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, remainder + size) != 0) exit(kBroken);
  char* const data = static_cast<char*>(memory) + remainder;
  read_exactly(data, size);
#ifdef HOSTCUDA_ASAN
  __asan_poison_memory_region(memory, remainder);
#endif
  return {data, size};
}

enum class Kind : int64_t { kPointer, kValue };

char* read_pointer(const std::vector<Region>& regions) {
  const int64_t region = read<int64_t>(), offset = read<int64_t>();
  return region < 0 ? nullptr : regions[region].data + offset;
}

}  // namespace

int main(int, char** arguments) {
  const auto options = read<hostcuda::Options>();
  std::vector<Region> regions(read<int64_t>());
  for (Region& region : regions) region = read_region();

  std::vector<std::vector<char>> values(read<int64_t>());
  for (std::vector<char>& value : values) {
    if (read<Kind>() == Kind::kPointer) {
      char* const pointer = read_pointer(regions);
      const char* const bytes = reinterpret_cast<const char*>(&pointer);
      value.assign(bytes, bytes + sizeof pointer);
    } else {
      value.resize(read<int64_t>());
      read_exactly(value.data(), value.size());
      for (auto left = read<int64_t>(); left > 0; --left) {  // pointers that it holds
        const int64_t place = read<int64_t>();
        char* const pointer = read_pointer(regions);
        memcpy(value.data() + place, &pointer, sizeof pointer);
      }
    }
  }
  std::vector<size_t> sizes;
  std::vector<void*> pointers;
  for (std::vector<char>& value : values) {
    sizes.push_back(value.size());
    pointers.push_back(value.data());
  }

  void* const library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    fprintf(stderr, "runner: %s\n", dlerror());
    return kBroken;
  }
  using Launch = const char*(const hostcuda::Options*, int, const size_t*, void**);
  const auto launch = reinterpret_cast<Launch*>(dlsym(library, "hostcuda_launch"));
  const char* const error = launch(&options, static_cast<int>(values.size()), sizes.data(), pointers.data());
  if (error != nullptr) {
    fprintf(stderr, "%s\n", error);
    return kFailed;
  }
  for (const Region& region : regions) fwrite(region.data, 1, region.size, stdout);
  return 0;
}
