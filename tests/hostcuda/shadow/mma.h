// Shadows <mma.h>: nvcuda::wmma.
//
// CUDA does not say which lane holds which element of a fragment. Two orders are offered, neither of them a GPU's, so
// that a kernel cannot depend on one by accident: in the scrambled order neighbours are far apart; in the paired order
// elements 2i and 2i + 1 of a lane are neighbours in a row, as on all GPUs so far.
#pragma once

#include <tuple>

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
namespace precision {
struct tf32;
}
enum layout_t { mem_row_major, mem_col_major };

namespace detail {

// The type in which a fragment stores its elements.
template <class T>
struct Storage {
  using Type = T;
};
template <>
struct Storage<precision::tf32> {
  using Type = float;
};

template <class Use, int M, int N, int K>
struct Shape;
template <int M, int N, int K>
struct Shape<matrix_a, M, N, K> {
  static constexpr int kRows = M, kCols = K;
};
template <int M, int N, int K>
struct Shape<matrix_b, M, N, K> {
  static constexpr int kRows = K, kCols = N;
};
template <int M, int N, int K>
struct Shape<accumulator, M, N, K> {
  static constexpr int kRows = M, kCols = N;
};

// As many as CUDA declares: two lanes hold each element of a __half factor.
template <class Use, class T, int kSize>
constexpr int kNumElements = kSize / 32;
template <int kSize>
constexpr int kNumElements<matrix_a, __half, kSize> = 16;
template <int kSize>
constexpr int kNumElements<matrix_b, __half, kSize> = 16;

// Where the elements of all lanes belong: at(lane)[i] is row * kCols + col of the lane's element i.
template <int kSize, int kPerLane>
class Order {
 public:
  static const uint16_t* at(int lane) {
    static const Order scrambled(false), paired(true);
    return (hostcuda::options.paired_fragments ? paired : scrambled).index[lane];
  }

 private:
  uint16_t index[32][kPerLane];

  explicit Order(bool paired) {
    constexpr int kMultiplier = 37, kOffset = 11;  // odd, so that every element is met
    for (int slot = 0; slot < 32 * kPerLane; ++slot) {
      const int flat = paired ? (slot / 2 * kMultiplier + kOffset) % (kSize / 2) * 2 + slot % 2
                              : (slot * kMultiplier + kOffset) % kSize;
      index[slot / kPerLane][slot % kPerLane] = static_cast<uint16_t>(flat);
    }
  }
};

}  // namespace detail

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  using element_type = T;
  using storage_element_type = typename detail::Storage<T>::Type;

  static constexpr int kRows = detail::Shape<Use, M, N, K>::kRows, kCols = detail::Shape<Use, M, N, K>::kCols;
  static constexpr int num_elements = detail::kNumElements<Use, T, kRows * kCols>;
  static constexpr int num_storage_elements = num_elements;

  storage_element_type x[num_elements];

  fragment() { memset(x, hostcuda::kNanByte, sizeof x); }

  static const uint16_t* order(int lane) { return detail::Order<kRows * kCols, num_elements>::at(lane); }
};

inline float __float_to_tf32(float x) { return hostcuda::round_to_tf32(x); }

template <class Fragment>
inline void fill_fragment(Fragment& target, const typename Fragment::storage_element_type& value) {
  for (auto& element : target.x) element = value;
}

namespace detail {

template <class T>
inline void check_address(const T* pointer, unsigned leading_dimension, const char* operation, hostcuda::Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % 32 != 0) {
    hostcuda::fail("%s at %s:%d: the address is not a multiple of 32", operation, site.file, site.line);
  }
  if (leading_dimension * sizeof(T) % 16 != 0) {
    hostcuda::fail("%s at %s:%d: the leading dimension of %u elements is not a multiple of 16 bytes", operation,
                   site.file, site.line, leading_dimension);
  }
  hostcuda::note_step(site, pointer, leading_dimension);
}

// Calls function(element, position in memory) for each element of this lane.
template <class Fragment, class Function>
inline void for_each_element(Fragment& target, bool by_rows, unsigned leading_dimension, Function function) {
  const uint16_t* const order = Fragment::order(hostcuda::current->lane);
  for (int i = 0; i < Fragment::num_elements; ++i) {
    const unsigned row = order[i] / Fragment::kCols, col = order[i] % Fragment::kCols;
    function(target.x[i], by_rows ? row * leading_dimension + col : col * leading_dimension + row);
  }
}

template <class Fragment, class T>
inline void load(Fragment& target, const T* source, unsigned leading_dimension, bool by_rows, hostcuda::Site site) {
  check_address(source, leading_dimension, "wmma::load_matrix_sync", site);
  for_each_element(target, by_rows, leading_dimension, [&](T& element, unsigned i) { element = source[i]; });
}

// The whole matrix, put together from what the lanes hold.
template <class Sum, class Fragment, class Number>
inline void gather(Sum* matrix, const Fragment& source, int lane, Number number) {
  const uint16_t* const order = Fragment::order(lane);
  for (int i = 0; i < Fragment::num_elements; ++i) matrix[order[i]] = number(source.x[i]);
}

template <class T>
inline float factor(typename Storage<T>::Type x) {
  return std::is_same_v<T, precision::tf32> ? hostcuda::truncate_to_tf32(hostcuda::to_float(x)) : hostcuda::to_float(x);
}

}  // namespace detail

template <class Use, int M, int N, int K, class T, class Layout>
inline void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& target, const typename detail::Storage<T>::Type* source,
                             unsigned leading_dimension, hostcuda::Site site = hostcuda::Site::here()) {
  detail::load(target, source, leading_dimension, std::is_same_v<Layout, row_major>, site);
}

template <int M, int N, int K, class T>
inline void load_matrix_sync(fragment<accumulator, M, N, K, T>& target, const T* source, unsigned leading_dimension,
                             layout_t layout, hostcuda::Site site = hostcuda::Site::here()) {
  detail::load(target, source, leading_dimension, layout == mem_row_major, site);
}

template <int M, int N, int K, class T>
inline void store_matrix_sync(T* target, const fragment<accumulator, M, N, K, T>& source, unsigned leading_dimension,
                              layout_t layout, hostcuda::Site site = hostcuda::Site::here()) {
  detail::check_address(target, leading_dimension, "wmma::store_matrix_sync", site);
  detail::for_each_element(source, layout == mem_row_major, leading_dimension,
                           [&](const T& element, unsigned i) { target[i] = element; });
}

// result = a b + c. Tensor cores keep products exact and round (or cut off) their sum with c once: so in double.
template <int M, int N, int K, class T, class TA, class LayoutA, class TB, class LayoutB, class TC>
inline void mma_sync(fragment<accumulator, M, N, K, T>& result, const fragment<matrix_a, M, N, K, TA, LayoutA>& a,
                     const fragment<matrix_b, M, N, K, TB, LayoutB>& b, const fragment<accumulator, M, N, K, TC>& c,
                     hostcuda::Site site = hostcuda::Site::here()) {
  const auto argument = std::make_tuple(&result, &a, &b, &c);
  using Argument = decltype(argument);
  hostcuda::warp_operation(
      hostcuda::kAllLanes, "wmma::mma_sync", site, argument, [&](const hostcuda::Lanes<Argument>& lanes) {
        if (!lanes.all_present()) {
          hostcuda::fail("wmma::mma_sync at %s:%d: some lanes of the warp have exited", site.file, site.line);
        }
        float factor_a[M * K], factor_b[K * N];
        double sum[M * N];
        lanes.for_each([&](int lane, const Argument& mine) {
          detail::gather(factor_a, *std::get<1>(mine), lane, detail::factor<TA>);
          detail::gather(factor_b, *std::get<2>(mine), lane, detail::factor<TB>);
          detail::gather(sum, *std::get<3>(mine), lane, [](TC x) { return hostcuda::to_float(x); });
        });
        for (int i = 0; i < M; ++i) {
          for (int k = 0; k < K; ++k) {
            for (int j = 0; j < N; ++j) {
              sum[i * N + j] += double(factor_a[i * K + k]) * factor_b[k * N + j];
            }
          }
        }
        lanes.for_each([&](int lane, const Argument& mine) {
          auto& target = *std::get<0>(mine);
          const uint16_t* const order = target.order(lane);
          for (int i = 0; i < target.num_elements; ++i) target.x[i] = hostcuda::from_float<T>(float(sum[order[i]]));
        });
      });
}

}  // namespace nvcuda::wmma
