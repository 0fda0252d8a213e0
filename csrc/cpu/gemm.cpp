#include "cpu/gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/scratch.h"

namespace glam::cpu {
namespace {

constexpr int64_t kRowTilesPerBlock = 8;
constexpr int64_t kColumnsPerBlock = 1024;
constexpr int64_t kPackedBytes =
    int64_t{64} << 20;  // packed B panels held at once; a product with an epilogue stays whole and may pass it

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Part of a product: all rows, columns [column, column + columns), whose B panels start at `packed`.
struct Slice {
  int64_t product;
  int64_t column;
  int64_t columns;
  int64_t packed;       // element offset into the packed buffer
  int64_t first_strip;  // running totals over the batch, for the parallel loops
  int64_t first_task;
  int64_t row_blocks;
};

template <class T>
class Batch {
 public:
  Batch(const std::vector<Product>& products, const RowEpilogue<T>* epilogue)
      : products_(products), epilogue_(epilogue), functions_(gemm_functions<T>()) {}

  bool empty() const { return slices_.empty(); }
  int64_t packed_elements() const { return packed_elements_; }

  void add(int64_t product, int64_t column, int64_t columns) {
    const Product& p = products_[product];
    const int64_t blocks = (p.m + block_rows() - 1) / block_rows();
    const int64_t strips = (columns + functions_.tile_columns - 1) / functions_.tile_columns;
    slices_.push_back({product, column, columns, packed_elements_, num_strips_, num_tasks_, blocks});
    packed_elements_ += strips * functions_.tile_columns * p.k;
    num_strips_ += strips;
    num_tasks_ += blocks * column_blocks(columns);
  }

  void run() {
    static thread_local Scratch packed_scratch;
    T* const packed = packed_scratch.get<T>(packed_elements_);
    at::parallel_for(0, num_strips_, 1, [&](int64_t begin, int64_t end) {
      for_range(begin, end, &Slice::first_strip, [&](const Slice& slice, int64_t first, int64_t last) {
        const Product& p = products_[slice.product];
        const int64_t width = functions_.tile_columns;
        functions_.pack(p.b, slice.column + first * width, slice.column + std::min(last * width, slice.columns), p.k,
                        width, packed + slice.packed + first * width * p.k);
      });
    });
    at::parallel_for(0, num_tasks_, 1, [&](int64_t begin, int64_t end) {
      for_range(begin, end, &Slice::first_task, [&](const Slice& slice, int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) run_task(slice, task, packed);
      });
    });
    slices_.clear();
    packed_elements_ = num_strips_ = num_tasks_ = 0;
  }

 private:
  int64_t block_rows() const { return kRowTilesPerBlock * functions_.tile_rows; }
  int64_t column_blocks(int64_t columns) const {
    return epilogue_ ? 1 : (columns + kColumnsPerBlock - 1) / kColumnsPerBlock;
  }

  // Calls f(slice, first, last) for the parts of the batch-wide range [begin, end), numbered within each slice.
  template <class F>
  void for_range(int64_t begin, int64_t end, int64_t Slice::* start, F&& f) const {
    for (size_t i = 0; i < slices_.size(); ++i) {
      const int64_t slice_begin = slices_[i].*start;
      const int64_t slice_end =
          i + 1 < slices_.size() ? slices_[i + 1].*start : (start == &Slice::first_strip ? num_strips_ : num_tasks_);
      const int64_t first = std::max(begin, slice_begin), last = std::min(end, slice_end);
      if (first < last) f(slices_[i], first - slice_begin, last - slice_begin);
    }
  }

  void run_task(const Slice& slice, int64_t task, const T* packed) const {
    static thread_local Scratch a_scratch, c_scratch;
    const Product& p = products_[slice.product];
    // Row blocks run fastest: consecutive tasks share their B panels.
    const int64_t row = task % slice.row_blocks * block_rows();
    const int64_t column_begin = task / slice.row_blocks * kColumnsPerBlock;
    const int64_t rows = std::min(block_rows(), p.m - row);
    const int64_t columns = epilogue_ ? slice.columns : std::min(kColumnsPerBlock, slice.columns - column_begin);
    const int64_t stride = round_up(columns, functions_.tile_columns);
    T* const a = a_scratch.get<T>(block_rows() * p.k);
    T* const c = c_scratch.get<T>(block_rows() * stride);
    functions_.pack(p.a, row, row + rows, p.k, functions_.tile_rows, a);
    functions_.multiply(rows, columns, p.k, a, packed + slice.packed + column_begin * p.k, c, stride);
    if (epilogue_) {
      (*epilogue_)(slice.product, row, rows, c, stride);
    } else {
      functions_.store(c, stride, rows, columns, p.c, row, slice.column + column_begin);
    }
  }

  const std::vector<Product>& products_;
  const RowEpilogue<T>* epilogue_;
  const GemmFunctions<T>& functions_;
  std::vector<Slice> slices_;
  int64_t packed_elements_ = 0;
  int64_t num_strips_ = 0;
  int64_t num_tasks_ = 0;
};

template <class T>
void run(const std::vector<Product>& products, const RowEpilogue<T>* epilogue) {
  Batch<T> batch(products, epilogue);
  const int64_t limit = kPackedBytes / static_cast<int64_t>(sizeof(T));
  for (size_t i = 0; i < products.size(); ++i) {
    const Product& p = products[i];
    if (p.m == 0 || p.n == 0) continue;
    // Whole column blocks at a time; with an epilogue a product stays in one piece.
    const int64_t fitting =
        std::max(limit / std::max<int64_t>(p.k, 1) / kColumnsPerBlock, int64_t{1}) * kColumnsPerBlock;
    const int64_t step = epilogue ? p.n : std::min(p.n, fitting);
    for (int64_t column = 0; column < p.n; column += step) {
      const int64_t columns = std::min(step, p.n - column);
      if (!batch.empty() && batch.packed_elements() + columns * p.k > limit) batch.run();
      batch.add(static_cast<int64_t>(i), column, columns);
    }
  }
  if (!batch.empty()) batch.run();
}

}  // namespace

template <class T>
void run_products(const std::vector<Product>& products) {
  run<T>(products, nullptr);
}
template <class T>
void run_products(const std::vector<Product>& products, RowEpilogue<T> epilogue) {
  run<T>(products, &epilogue);
}
template void run_products<float>(const std::vector<Product>&);
template void run_products<double>(const std::vector<Product>&);
template void run_products<float>(const std::vector<Product>&, RowEpilogue<float>);
template void run_products<double>(const std::vector<Product>&, RowEpilogue<double>);

Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Type::f64;
    case at::kFloat:
      return Type::f32;
    case at::kBFloat16:
      return Type::bf16;
    default:
      TORCH_CHECK(false, "glam: expected Double, Float or BFloat16 on CPU, got ", tensor.scalar_type());
  }
}

Operand outer_rows(const at::Tensor& matrix) {
  TORCH_INTERNAL_ASSERT(matrix.stride(1) == 1 || matrix.stride(0) == 1 || matrix.numel() == 0);
  const bool transposed = matrix.stride(1) != 1 && matrix.size(1) > 1;
  return {.data = matrix.const_data_ptr(),
          .type = type_of(matrix),
          .row_stride = matrix.stride(transposed ? 1 : 0),
          .rows_are_k = transposed};
}

Operand outer_columns(const at::Tensor& matrix) { return outer_rows(matrix.t()); }

Output output_to(const at::Tensor& matrix, bool accumulate) {
  return {.data = matrix.mutable_data_ptr(),
          .type = type_of(matrix),
          .row_stride = matrix.stride(0),
          .accumulate = accumulate};
}

at::Tensor with_unit_stride(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.stride(0) == 1 ? matrix : matrix.contiguous();
}

}  // namespace glam::cpu
