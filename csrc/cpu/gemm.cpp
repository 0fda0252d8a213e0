#include "cpu/gemm.h"

#include <unistd.h>

#include <algorithm>

#include "cpu/phases.h"
#include "cpu/scratch.h"
#include "ops/packed_layout.h"

namespace glam::cpu {
namespace {

constexpr int64_t kColumnsPerSlice = 1024;  // without an epilogue, if the panels have at most
constexpr int64_t kSliceBytes = 8 << 20;
constexpr int64_t kPackedBytes = 4 << 20;      // of B panels packed at a time; a product with an epilogue is whole
constexpr int64_t kDepthBytes = 8 << 10;       // of a row of A panels, so that the second-level cache holds many
constexpr int64_t kFusedDepthBytes = 1 << 10;  // less: a part of B that fits is as wide, and read in long runs
constexpr int64_t kBuffers = 3;                // of packed panels
constexpr int64_t kStripsPerTask = 4;          // packed at a time
constexpr int64_t kTasksPerThread = 4;         // where there is little to do, blocks become smaller to share it

// Bytes of a core's own; 1 MiB where the system does not say.
int64_t second_level_cache() {
  static const int64_t bytes = [] {
    constexpr int64_t kLeast = 256 << 10, kMost = 2 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return std::clamp<int64_t>(size, kLeast, kMost);
#endif
    return int64_t{1} << 20;
  }();
  return bytes;
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// All rows of a product, columns [column, column + columns), cut into row blocks: a task each. The B panels are at
// `in_place`, or else at `packed` (bytes) of their batch's buffer; a fused product's only task of the slice packs some at a
// time and multiplies them while they are in its core's cache.
struct Slice {
  int64_t product, column, columns, packed;
  const void* in_place;
  int64_t blocks;
  int64_t first_strip, first_task;  // running totals of the batch
};

// Slices whose B panels are packed together.
struct Batch {
  std::vector<Slice> slices;
  int64_t packed_bytes = 0, num_strips = 0, num_tasks = 0;
};

template <class T>
class Run {
 public:
  Run(const std::vector<Product>& products, Precision precision, const RowEpilogue<T>* epilogue)
      : products_(products), epilogue_(epilogue), functions_(gemm_functions<T>(precision)) {}

  void operator()() {
    make_batches();
    int64_t buffer_bytes = 0;
    for (const Batch& batch : batches_) buffer_bytes = std::max(buffer_bytes, round_up(batch.packed_bytes, 64));
    const auto num_batches = static_cast<int64_t>(batches_.size());
    static thread_local Scratch scratch;
    char* const buffers = scratch.get<char>(buffer_bytes * std::min(num_batches, kBuffers));

    // In the order pack 0, pack 1, multiply 0, pack 2, multiply 1, ...: a buffer is free again kBuffers batches later.
    Phases phases;
    std::vector<Step> steps;
    std::vector<int64_t> multiplied;
    const auto pack = [&](int64_t b) {
      steps.push_back({&batches_[b], buffers + b % kBuffers * buffer_bytes, true});
      return phases.add(divide_up(batches_[b].num_strips, kStripsPerTask),
                        b >= kBuffers ? multiplied[b - kBuffers] : Phases::kNone);
    };
    int64_t packed = num_batches > 0 ? pack(0) : Phases::kNone;
    for (int64_t b = 0; b < num_batches; ++b) {
      const int64_t next = b + 1 < num_batches ? pack(b + 1) : Phases::kNone;
      steps.push_back({&batches_[b], steps[packed].buffer, false});
      multiplied.push_back(phases.add(batches_[b].num_tasks, packed));
      packed = next;
    }
    phases.run([&](int64_t phase, int64_t task) {
      const Step& step = steps[phase];
      step.is_pack ? pack_strips(*step.batch, task, step.buffer) : multiply(*step.batch, task, step.buffer);
    });
  }

 private:
  struct Step {
    const Batch* batch;
    char* buffer;
    bool is_pack;
  };

  // So few rows that one task takes all, and that their sums, written and read again with each part of the depth, are
  // little beside B: panels that one core reads once need not go through a shared cache.
  bool is_fused(const Product& p) const {
    constexpr int64_t kLittle = 4;
    const bool has_sums = epilogue_ || !functions_.whole_depth;
    const bool sums_are_little =
        !has_sums || kLittle * p.m * static_cast<int64_t>(sizeof(T)) <= functions_.panel_bytes(p.k);
    return fuses_ && row_tiles(p) <= functions_.block_row_tiles && sums_are_little &&
           !functions_.panels_in_place(p.b, 0, p.k);
  }
  // As many for each thread, of nearly one size: none is a straggler.
  int64_t row_blocks(const Product& p, int64_t columns) const {
    if (is_fused(p)) return 1;
    const int64_t sums = (epilogue_ ? columns : 0) + (depth_at_once(p) < p.k ? columns : functions_.tile_columns);
    const int64_t row_bytes = functions_.panel_bytes(depth_at_once(p)) + sums * static_cast<int64_t>(sizeof(T));
    const int64_t tile_bytes = std::max<int64_t>(row_bytes * functions_.tile_rows, 1);
    const int64_t block_bytes = second_level_cache() / 8 * functions_.block_eighths;
    const int64_t tiles = std::clamp<int64_t>(block_bytes / tile_bytes, 1, functions_.block_row_tiles);
    const int64_t all = row_tiles(p), blocks = divide_up(all, tiles);
    return std::min(all, blocks == 1 ? 1 : round_up(blocks, at::get_num_threads()));
  }
  // Of A panels, in parts of nearly one size.
  int64_t depth_at_once(const Product& p) const {
    if (functions_.whole_depth) return p.k;
    const int64_t parts = divide_up(functions_.panel_bytes(p.k), is_fused(p) ? kFusedDepthBytes : kDepthBytes);
    return parts <= 1 ? p.k : round_up(divide_up(p.k, parts), 64);
  }
  int64_t row_tiles(const Product& p) const { return divide_up(p.m, functions_.tile_rows); }
  // The first row of a block.
  int64_t row_of(const Product& p, int64_t block, int64_t blocks) const {
    return std::min(p.m, row_tiles(p) * block / blocks * functions_.tile_rows);
  }

  void make_batches() {
    int64_t columns_per_slice = kColumnsPerSlice;
    // Where there are too few tasks for the threads: rows apart from each other, or narrower ones.
    const int64_t wanted = at::get_num_threads() * kTasksPerThread;
    fuses_ = at::get_num_threads() == 1 || !epilogue_ || count_tasks(columns_per_slice) >= wanted;
    while (!epilogue_ && columns_per_slice > functions_.tile_columns && count_tasks(columns_per_slice) < wanted) {
      columns_per_slice = round_up(columns_per_slice / 2, functions_.tile_columns);
    }
    for (size_t i = 0; i < products_.size(); ++i) {
      const Product& p = products_[i];
      if (p.m == 0) continue;
      const int64_t step = slice_columns(p, columns_per_slice);
      for (int64_t column = 0; column < p.n; column += step) {
        add(static_cast<int64_t>(i), column, std::min(step, p.n - column));
      }
    }
  }

  // `most`, or what has kSliceBytes of panels; all where there is an epilogue.
  int64_t slice_columns(const Product& p, int64_t most) const {
    if (epilogue_) return p.n;
    const int64_t fit = kSliceBytes / std::max<int64_t>(functions_.panel_bytes(p.k), 1);
    const int64_t tiles = std::max<int64_t>(fit / functions_.tile_columns, 1);
    return std::min(most, tiles * functions_.tile_columns);
  }

  int64_t count_tasks(int64_t columns_per_slice) const {
    int64_t tasks = 0;
    for (const Product& p : products_) {
      const int64_t columns = std::min(slice_columns(p, columns_per_slice), p.n);
      if (p.m > 0 && p.n > 0) tasks += divide_up(p.n, columns) * row_blocks(p, columns);
    }
    return tasks;
  }

  void add(int64_t product, int64_t column, int64_t columns) {
    const Product& p = products_[product];
    const void* const in_place = functions_.panels_in_place(p.b, column, p.k);
    const int64_t strips = in_place || is_fused(p) ? 0 : divide_up(columns, functions_.tile_columns);
    const int64_t bytes = strips * functions_.tile_columns * functions_.panel_bytes(p.k);
    if (batches_.empty() || (batches_.back().packed_bytes + bytes > kPackedBytes && batches_.back().num_tasks > 0)) {
      batches_.emplace_back();
    }
    Batch& batch = batches_.back();
    const int64_t blocks = row_blocks(p, columns);
    batch.slices.push_back(
        {product, column, columns, batch.packed_bytes, in_place, blocks, batch.num_strips, batch.num_tasks});
    batch.packed_bytes += bytes;
    batch.num_strips += strips;
    batch.num_tasks += blocks;
  }

  // The slice in which the `index`-th strip or task of a batch lies.
  static const Slice& find(const Batch& batch, int64_t Slice::* first, int64_t index) {
    const auto after = std::ranges::upper_bound(batch.slices, index, {}, first);
    return *(after - 1);
  }

  void pack_strips(const Batch& batch, int64_t task, char* buffer) const {
    const int64_t width = functions_.tile_columns;
    const int64_t end = std::min((task + 1) * kStripsPerTask, batch.num_strips);
    for (int64_t strip = task * kStripsPerTask; strip < end;) {
      const Slice& slice = find(batch, &Slice::first_strip, strip);
      const Product& p = products_[slice.product];
      const int64_t first = (strip - slice.first_strip) * width;
      const int64_t last = std::min((end - slice.first_strip) * width, slice.columns);
      functions_.pack_b(p.b, slice.column + first, slice.column + last, p.k,
                        buffer + slice.packed + first * functions_.panel_bytes(p.k));
      strip = slice.first_strip + divide_up(last, width);
    }
  }

  // Packs steps [k, k + depth) of a slice, as many columns at a time as fill a quarter of the second-level cache, and calls
  // multiply(first, columns, panels) for each.
  template <class Multiply>
  void pack_in_turn(const Slice& slice, int64_t k, int64_t depth, Multiply&& multiply) const {
    static thread_local Scratch scratch;
    const Operand& b = products_[slice.product].b;
    const int64_t strip_bytes = std::max<int64_t>(functions_.panel_bytes(depth) * functions_.tile_columns, 1);
    const int64_t strips = std::clamp<int64_t>(second_level_cache() / 4 / strip_bytes, 1,
                                               divide_up(slice.columns, functions_.tile_columns));
    const int64_t width = strips * functions_.tile_columns;
    char* const panels = scratch.get<char>(strips * strip_bytes);
    for (int64_t first = 0; first < slice.columns; first += width) {
      const int64_t columns = std::min(width, slice.columns - first), begin = slice.column + first;
      functions_.pack_b(from_k<T>(b, k), begin, begin + columns, depth, panels);
      multiply(first, columns, panels);
    }
  }

  void multiply(const Batch& batch, int64_t task, const char* buffer) const {
    static thread_local Scratch a_scratch, sums_scratch, c_scratch;
    const Slice& slice = find(batch, &Slice::first_task, task);
    const Product& p = products_[slice.product];
    const int64_t block = task - slice.first_task, row = row_of(p, block, slice.blocks);
    const int64_t rows = row_of(p, block + 1, slice.blocks) - row;
    const int64_t padded = round_up(rows, functions_.tile_rows);
    const int64_t stride = round_up(slice.columns, functions_.tile_columns), depth = depth_at_once(p);
    char* const a = a_scratch.get<char>(padded * functions_.panel_bytes(depth));
    T* const sums = sums_scratch.get<T>(padded * (depth < p.k ? stride : functions_.tile_columns));
    T* const c = epilogue_ ? c_scratch.get<T>(padded * stride) : nullptr;
    int64_t k = 0;
    do {
      const int64_t end = std::min(k + depth, p.k), part = end - k;
      functions_.pack_a(from_k<T>(p.a, k), row, row + rows, part, a);
      const auto multiply_columns = [&](int64_t first, int64_t columns, const DepthPart& steps, const void* b) {
        T* const strip_sums = depth < p.k ? sums + padded * first : sums;
        if (epilogue_) {
          functions_.multiply(rows, columns, steps, a, b, strip_sums, c + first, stride);
        } else {
          functions_.multiply_into(rows, columns, steps, a, b, strip_sums, p.b, p.c, row, slice.column + first);
        }
      };
      if (is_fused(p)) {
        const DepthPart packed{0, part, part, k == 0, end == p.k};
        pack_in_turn(slice, k, part, [&](int64_t first, int64_t columns, const void* b) {
          multiply_columns(first, columns, packed, b);
        });
      } else {
        multiply_columns(0, slice.columns, {k, end, p.k, k == 0, end == p.k},
                         slice.in_place ? slice.in_place : buffer + slice.packed);
      }
      k = end;
    } while (k < p.k);
    if (!epilogue_) return;
    functions_.scale(p.b, rows, slice.column, slice.columns, c, stride);
    (*epilogue_)(slice.product, row, rows, c, stride);
  }

  const std::vector<Product>& products_;
  const RowEpilogue<T>* epilogue_;
  const GemmFunctions<T>& functions_;
  bool fuses_ = true;
  std::vector<Batch> batches_;
};

// Products of so few rows that reading B is what takes time: tasks of some of its columns each.
template <class T>
class FewRows {
 public:
  FewRows(const std::vector<Product>& products, Precision precision)
      : products_(products), functions_(gemm_functions<T>(precision)) {}

  void operator()() const {
    int64_t loaded_bytes = 0;
    std::vector<Task> tasks;
    for (const Product& p : products_) {
      const int64_t columns = columns_per_task(p);
      for (int64_t column = 0; column < p.n; column += columns) {
        tasks.push_back({&p, loaded_bytes, column, std::min(columns, p.n - column)});
      }
      loaded_bytes += functions_.few_rows * functions_.panel_bytes(p.k);
    }
    static thread_local Scratch loaded_scratch;
    char* const loaded = loaded_scratch.get<char>(loaded_bytes);
    int64_t begin = 0;
    for (const Product& p : products_) {
      functions_.load_few(p.a, p.m, p.k, loaded + begin);
      begin += functions_.few_rows * functions_.panel_bytes(p.k);
    }
    at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t first, int64_t last) {
      static thread_local Scratch c_scratch;
      for (int64_t i = first; i < last; ++i) {
        const auto& [p, row_bytes, column, columns] = tasks[i];
        const int64_t stride = round_up(columns, functions_.tile_columns);
        T* const c = c_scratch.get<T>(functions_.few_rows * stride);
        functions_.multiply_few(p->m, loaded + row_bytes, p->b, column, columns, p->k, c, stride);
        functions_.store(c, stride, p->m, columns, p->c, 0, column);
      }
    });
  }

 private:
  struct Task {
    const Product* product;
    int64_t loaded, column, columns;
  };

  // Long stretches of B's rows, whose sums stay in the L1 cache.
  int64_t columns_per_task(const Product& p) const {
    constexpr int64_t kSumBytes = 16 << 10;
    const int64_t most = kSumBytes / (static_cast<int64_t>(sizeof(T)) * p.m);
    const int64_t share = divide_up(p.n, at::get_num_threads());
    return round_up(std::min(most, share), std::max(functions_.tile_columns, kStripColumns));
  }

  const std::vector<Product>& products_;
  const GemmFunctions<T>& functions_;
};

}  // namespace

template <class T>
void run_products(const std::vector<Product>& products, Precision precision) {
  const GemmFunctions<T>& functions = gemm_functions<T>(precision);
  const auto is_few = [&](const Product& p) {
    return p.m <= functions.few_rows && p.m > 0 && p.n > 0 && p.k > 0 && functions.can_stream(p.a, p.b);
  };
  std::vector<Product> few, many;
  for (const Product& p : products) (is_few(p) ? few : many).push_back(p);
  if (!few.empty()) FewRows<T>(few, precision)();
  if (!many.empty()) Run<T>(many, precision, nullptr)();
}
template <class T>
void run_products(const std::vector<Product>& products, Precision precision, RowEpilogue<T> epilogue) {
  Run<T>(products, precision, &epilogue)();
}
template void run_products<float>(const std::vector<Product>&, Precision);
template void run_products<double>(const std::vector<Product>&, Precision);
template void run_products<float>(const std::vector<Product>&, Precision, RowEpilogue<float>);
template void run_products<double>(const std::vector<Product>&, Precision, RowEpilogue<double>);

Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Type::f64;
    case at::kFloat:
      return Type::f32;
    case at::kBFloat16:
      return Type::bf16;
    case at::kChar:
      return Type::i8;
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

Operand outer_columns(const at::Tensor& matrix) {
  if (matrix.dim() == 2) return outer_rows(matrix.t());
  TORCH_INTERNAL_ASSERT(matrix.dim() == 3 && matrix.is_contiguous());  // packed for inference
  return {.data = matrix.const_data_ptr(),
          .type = type_of(matrix),
          .row_stride = matrix.size(1) * matrix.size(2),
          .stored = true};
}

Output output_to(const at::Tensor& matrix, bool accumulate) {
  return {.data = matrix.mutable_data_ptr(),
          .type = type_of(matrix),
          .row_stride = matrix.stride(0),
          .accumulate = accumulate};
}

Output output_to_part(const at::Tensor& matrix, const at::Tensor& whole) {
  constexpr size_t kCacheBytes = size_t{16} << 20;
  Output output = output_to(matrix);
  output.stream = whole.nbytes() > kCacheBytes;
  return output;
}

at::Tensor with_unit_stride(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.stride(0) == 1 ? matrix : matrix.contiguous();
}

}  // namespace glam::cpu
