// CPU kernels of the Adafactor ops and of squared_norm. The threads share the blocks, of fixed size, of all parameters of
// a list; a parameter's sums are those of its blocks in their order, so neither the threads nor the list change its bits.

#include "cpu/kernels/adafactor.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/phases.h"
#include "cpu/scratch.h"
#include "ops/adafactor.h"
#include "ops/checks.h"

namespace glam::cpu {
namespace {

constexpr int64_t kRowsPerBlock = 64;
constexpr int64_t kElementsPerBlock = 16384;
// A thread's task is a run of blocks, long enough to be read at full speed (two threads that take turns in 256 KiB reach
// three quarters of it), short enough for all to have an equal share.
constexpr int64_t kLeastPerTask = 1 << 16, kMostPerTask = 1 << 20;  // elements
constexpr int64_t kTasksPerThread = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t element_blocks(int64_t total) { return ceil_div(total, kElementsPerBlock); }
int64_t row_blocks(int64_t R) { return ceil_div(R, kRowsPerBlock); }  // of one matrix: they never cross into the next

bool has_matrices(const ParameterShape& shape) { return shape.factored && shape.numel() > 0; }
int64_t num_blocks(const ParameterShape& shape) {
  return has_matrices(shape) ? shape.N * row_blocks(shape.R) : element_blocks(shape.numel());
}

// What the threads do for a list, in phases: a phase's tasks run once the phase that it comes after is complete.
class Work {
 public:
  static constexpr int64_t kNone = Phases::kNone;

  // f(task)
  int64_t add(int64_t tasks, std::function<void(int64_t)> f, int64_t after = kNone) {
    tasks_.push_back(std::move(f));
    return phases_.add(tasks, after);
  }
  // f(block, begin, count) for the blocks of `total` elements.
  template <class F>
  int64_t add_elements(int64_t total, F f) {
    return add_blocks(element_blocks(total), kElementsPerBlock, kNone, [=](int64_t block) {
      const int64_t begin = block * kElementsPerBlock;
      f(block, begin, std::min(kElementsPerBlock, total - begin));
    });
  }
  // f(block, matrix, row, count) for the blocks of rows of N matrices; rows are counted from the first matrix on.
  template <class F>
  int64_t add_rows(const ParameterShape& shape, int64_t after, F f) {
    const int64_t R = shape.R, per_matrix = row_blocks(R);
    return add_blocks(shape.N * per_matrix, kRowsPerBlock * shape.C, after, [=](int64_t block) {
      const int64_t matrix = block / per_matrix, row = block % per_matrix * kRowsPerBlock;
      f(block, matrix, matrix * R + row, std::min(kRowsPerBlock, R - row));
    });
  }
  void run() const {
    phases_.run([&](int64_t phase, int64_t task) { tasks_[phase](task); });
  }

 private:
  template <class F>
  int64_t add_blocks(int64_t count, int64_t elements, int64_t after, F f) {
    const int64_t share = count * elements / (kTasksPerThread * at::get_num_threads());
    const int64_t per_task =
        std::max<int64_t>(1, std::clamp(share, kLeastPerTask, kMostPerTask) / std::max<int64_t>(elements, 1));
    const auto run = [=](int64_t task) {
      for (int64_t block = task * per_task; block < std::min(count, (task + 1) * per_task); ++block) f(block);
    };
    return add(ceil_div(count, per_task), run, after);
  }

  Phases phases_;
  std::vector<std::function<void(int64_t)>> tasks_;
};

// State and weights are written in place through contiguous tensors, or copied back.
class InPlace {
 public:
  explicit InPlace(at::TensorList originals) : originals_(originals), contiguous_(contiguous(originals)) {}
  template <class T>
  T* data(size_t i) const {
    return contiguous_[i].mutable_data_ptr<T>();
  }
  void finish() const {
    for (size_t i = 0; i < contiguous_.size(); ++i) {
      if (!contiguous_[i].is_same(originals_[i])) originals_[i].copy_(contiguous_[i]);
    }
  }

 private:
  at::TensorList originals_;
  std::vector<Tensor> contiguous_;
};

bool is_set(const OptionalTensor& skip) { return skip && *skip->const_data_ptr<bool>(); }

// The squares of each tensor, summed by the work that has run when they are asked for.
class Squares {
 public:
  Squares(at::TensorList xs, Work& work) : xs_(contiguous(xs)), of_block_(xs_.size()) {
    for (size_t i = 0; i < xs_.size(); ++i) {
      const Type type = type_of(xs_[i]);
      const void* const data = xs_[i].const_data_ptr();
      auto& of_block = of_block_[i];
      of_block.resize(static_cast<size_t>(element_blocks(xs_[i].numel())));
      dispatch_accumulation(xs_[i].scalar_type(), [&](auto zero) {
        work.add_elements(xs_[i].numel(), [&of_block, type, data](int64_t block, int64_t begin, int64_t count) {
          of_block[block] = adafactor_functions<decltype(zero)>().square_sum(advance(data, type, begin), type, count);
        });
      });
    }
  }
  Tensor sums() const {
    const Tensor result = empty_doubles(static_cast<int64_t>(xs_.size()), xs_[0]);
    for (size_t i = 0; i < xs_.size(); ++i) {
      double sum = 0;
      for (const SquareSum& part : of_block_[i]) sum += part.sum;
      result.mutable_data_ptr<double>()[i] = sum;
    }
    return result;
  }
  Tensor nonfinite() const {
    const Tensor result = at::empty({static_cast<int64_t>(xs_.size())}, xs_[0].options().dtype(at::kBool));
    for (size_t i = 0; i < xs_.size(); ++i) {
      const auto& parts = of_block_[i];
      const bool finite = std::all_of(parts.begin(), parts.end(), [](const SquareSum& part) { return part.finite; });
      result.mutable_data_ptr<bool>()[i] = !finite;
    }
    return result;
  }

 private:
  std::vector<Tensor> xs_;
  std::vector<std::vector<SquareSum>> of_block_;
};

std::tuple<Tensor, Tensor> squared_norm(at::TensorList xs) {
  checks::squared_norm(xs);
  Work work;
  const Squares squares(xs, work);
  work.run();
  return {squares.sums(), squares.nonfinite()};
}

template <class T>
void add_matrix_sums(const T* grad, const ParameterShape& shape, T* row_sums, T* col_sums, T* col_sums_of_block,
                     Work& work) {
  const int64_t C = shape.C, per_matrix = row_blocks(shape.R);
  const auto of_block = [=](int64_t block, int64_t, int64_t row, int64_t count) {
    adafactor_functions<T>().matrix_sums(grad + row * C, count, C, row_sums + row, col_sums_of_block + block * C);
  };
  const auto of_matrix = [=](int64_t matrix) {
    T* const sums = col_sums + matrix * C;
    std::fill_n(sums, C, T(0));
    for (int64_t block = matrix * per_matrix; block < (matrix + 1) * per_matrix; ++block) {
      for (int64_t j = 0; j < C; ++j) sums[j] += col_sums_of_block[block * C + j];
    }
  };
  work.add(shape.N, of_matrix, work.add_rows(shape, Work::kNone, of_block));
}

std::tuple<Tensor, Tensor, Tensor> sums(at::TensorList grads_, at::TensorList weights,
                                        const c10::List<bool>& factored) {
  checks::adafactor_sums(grads_, weights, factored.vec());
  const auto grads = contiguous(grads_);
  const auto shapes = parameter_shapes(grads, factored.vec());
  const auto [rows, columns] = rows_and_columns(shapes);
  int64_t in_blocks = 0;
  for (const ParameterShape& shape : shapes) in_blocks += shape.factored ? num_blocks(shape) * shape.C : 0;
  const Tensor row_sums = at::empty({rows}, grads[0].options()), col_sums = at::empty({columns}, grads[0].options());
  Work work;
  const Squares weight_squares(weights, work);
  dispatch_accumulation(grads[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    static thread_local Scratch scratch;
    T* of_block = scratch.get<T>(in_blocks);
    for (size_t i = 0; i < shapes.size(); ++i) {
      const ParameterShape& shape = shapes[i];
      if (!shape.factored) continue;
      add_matrix_sums(grads[i].const_data_ptr<T>(), shape, row_sums.mutable_data_ptr<T>() + shape.rows,
                      col_sums.mutable_data_ptr<T>() + shape.columns, of_block, work);
      of_block += num_blocks(shape) * shape.C;
    }
  });
  work.run();
  return {row_sums, col_sums, weight_squares.sums()};
}

// state <- decay state + (1 - decay) (sums / of + eps)
template <class T>
void update_means(T* state, const T* sums, int64_t count, int64_t of, double decay, double eps) {
  for (int64_t i = 0; i < count; ++i) {
    state[i] = static_cast<T>(decay * state[i] + (1 - decay) * (static_cast<double>(sums[i]) / of + eps));
  }
}

template <class T>
void inverse_roots(const T* values, int64_t count, T* roots) {
  for (int64_t i = 0; i < count; ++i) roots[i] = T(1) / std::sqrt(values[i]);
}

// A pass over each parameter: prepare(matrix) for those of a factored one, then rows(...) or elements(...) for blocks.
template <class Pass>
void run_passes(std::vector<Pass>& passes) {
  Work work;
  std::vector<int64_t> prepared;
  for (Pass& pass : passes) {
    prepared.push_back(work.add(has_matrices(pass.shape) ? pass.shape.N : 0, [&pass](int64_t n) { pass.prepare(n); }));
  }
  for (size_t i = 0; i < passes.size(); ++i) {
    Pass& pass = passes[i];
    if (has_matrices(pass.shape)) {
      const auto rows = [&pass](auto... arguments) { pass.rows(arguments...); };
      work.add_rows(pass.shape, prepared[i], rows);
    } else {
      const auto elements = [&pass](auto... arguments) { pass.elements(arguments...); };
      work.add_elements(pass.shape.numel(), elements);
    }
  }
  work.run();
}

// Moves a parameter's state and sums the squares of its blocks.
template <class T>
struct StatisticsPass {
  ParameterShape shape;
  double rho, eps;
  int64_t num_rows, num_cols;  // of the whole parameter
  const T *grad, *row_sums, *col_sums;
  T *row_var, *col_var, *row_scale, *col_scale;  // the scales are inverse roots of what they are beside
  double* row_means;
  std::vector<double> squares_of_block = std::vector<double>(static_cast<size_t>(num_blocks(shape)));

  void prepare(int64_t matrix) const {
    const int64_t R = shape.R, C = shape.C, row = matrix * R, column = matrix * C;
    update_means(row_var + row, row_sums + row, R, num_cols, rho, eps);
    update_means(col_var + column, col_sums + column, C, num_rows, rho, eps);
    inverse_roots(row_var + row, R, row_scale + row);
    inverse_roots(col_var + column, C, col_scale + column);
    double total = 0;
    for (int64_t r = 0; r < R; ++r) total += row_var[row + r];
    row_means[matrix] = total / num_rows;
  }
  void rows(int64_t block, int64_t matrix, int64_t row, int64_t count) {
    const int64_t C = shape.C;
    squares_of_block[block] =
        adafactor_functions<T>().scaled_square_sum(grad + row * C, count, C, row_scale + row, col_scale + matrix * C);
  }
  void elements(int64_t block, int64_t begin, int64_t count) {
    squares_of_block[block] = adafactor_functions<T>().update_variance(row_var + begin, grad + begin, count,
                                                                       static_cast<T>(rho), static_cast<T>(eps));
  }
  double squares(int64_t matrix) const {
    const int64_t blocks = shape.numel() == 0 ? 0 : num_blocks(shape) / shape.N;
    double sum = 0;
    for (int64_t block = matrix * blocks; block < (matrix + 1) * blocks; ++block) sum += squares_of_block[block];
    return sum;
  }
};

std::tuple<Tensor, Tensor> stats_(at::TensorList row_vars, at::TensorList col_vars, at::TensorList grads_,
                                  const Tensor& row_sums_, const Tensor& col_sums_, const Tensor& step,
                                  const OptionalTensor& skip, at::IntArrayRef num_rows, at::IntArrayRef num_cols,
                                  double decay, double eps) {
  checks::adafactor_stats(row_vars, col_vars, grads_, row_sums_, col_sums_, step, skip, num_rows.size(),
                          num_cols.size());
  const auto shapes = parameter_shapes(grads_, row_vars);
  const int64_t matrices = shapes.back().matrices + shapes.back().N;
  const Tensor row_means = empty_doubles(matrices, grads_[0]).fill_(1),
               scaled_squares = empty_doubles(matrices, grads_[0]).zero_();
  if (is_set(skip)) return {row_means, scaled_squares};
  const double rho = 1 - std::pow(static_cast<double>(*step.const_data_ptr<int64_t>()) + 1, decay);
  const auto grads = contiguous(grads_);
  const Tensor row_sums = row_sums_.contiguous(), col_sums = col_sums_.contiguous();
  const Tensor row_scales = at::empty_like(row_sums), col_scales = at::empty_like(col_sums);
  const InPlace row_var(row_vars), col_var(col_vars);
  dispatch_accumulation(grads[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<StatisticsPass<T>> passes;
    for (size_t i = 0; i < grads.size(); ++i) {
      const ParameterShape& shape = shapes[i];
      passes.push_back({.shape = shape,
                        .rho = rho,
                        .eps = eps,
                        .num_rows = num_rows[i],
                        .num_cols = num_cols[i],
                        .grad = grads[i].const_data_ptr<T>(),
                        .row_sums = row_sums.const_data_ptr<T>() + shape.rows,
                        .col_sums = col_sums.const_data_ptr<T>() + shape.columns,
                        .row_var = row_var.data<T>(i),
                        .col_var = col_var.data<T>(i),
                        .row_scale = row_scales.mutable_data_ptr<T>() + shape.rows,
                        .col_scale = col_scales.mutable_data_ptr<T>() + shape.columns,
                        .row_means = row_means.mutable_data_ptr<double>() + shape.matrices});
    }
    run_passes(passes);
    auto* squares = scaled_squares.mutable_data_ptr<double>();
    for (const auto& pass : passes) {
      for (int64_t n = 0; n < pass.shape.N; ++n) *squares++ = pass.squares(n);
    }
  });
  row_var.finish();
  col_var.finish();
  return {row_means, scaled_squares};
}

Tensor update_squares(const Tensor& row_means, const Tensor& scaled_squares, at::IntArrayRef num_matrices) {
  checks::adafactor_update_squares(row_means, scaled_squares, c10::fromIntArrayRefSlow(num_matrices));
  const Tensor means = row_means.contiguous(), scaled = scaled_squares.contiguous();
  const Tensor squares = empty_doubles(static_cast<int64_t>(num_matrices.size()), row_means);
  const auto *mean = means.const_data_ptr<double>(), *scale = scaled.const_data_ptr<double>();
  for (size_t i = 0; i < num_matrices.size(); ++i) {
    double sum = 0;
    for (int64_t n = 0; n < num_matrices[i]; ++n) sum += *mean++ * *scale++;
    squares.mutable_data_ptr<double>()[i] = sum;
  }
  return squares;
}

// Updates a weight.
template <class T>
struct UpdatePass {
  ParameterShape shape;
  double factor;
  T* weight;
  const T *grad, *row_var, *col_var;
  T *row_scale, *col_scale;
  const double* row_means;

  void prepare(int64_t matrix) const {
    const int64_t R = shape.R, C = shape.C;
    T* const scale = row_scale + matrix * R;
    inverse_roots(row_var + matrix * R, R, scale);
    inverse_roots(col_var + matrix * C, C, col_scale + matrix * C);
    const double root = std::sqrt(row_means[matrix]);
    for (int64_t r = 0; r < R; ++r) scale[r] = static_cast<T>(scale[r] * factor * root);
  }
  void rows(int64_t, int64_t matrix, int64_t row, int64_t count) const {
    const int64_t C = shape.C;
    adafactor_functions<T>().apply_matrix(weight + row * C, grad + row * C, count, C, row_scale + row,
                                          col_scale + matrix * C);
  }
  void elements(int64_t, int64_t begin, int64_t count) const {
    adafactor_functions<T>().apply_elements(weight + begin, grad + begin, row_var + begin, count,
                                            static_cast<T>(factor));
  }
};

void apply_(at::TensorList weights, at::TensorList grads_, at::TensorList row_vars_, at::TensorList col_vars_,
            const Tensor& row_means_, const Tensor& weight_squares_, const Tensor& update_squares_, const Tensor& lr_,
            const OptionalTensor& skip, at::IntArrayRef num_elements, double clipping, double min_scale) {
  checks::adafactor_apply(weights, grads_, row_vars_, col_vars_, row_means_, weight_squares_, update_squares_, lr_,
                          skip, num_elements.size());
  if (is_set(skip)) return;
  const auto grads = contiguous(grads_), row_vars = contiguous(row_vars_), col_vars = contiguous(col_vars_);
  const Tensor row_means = row_means_.contiguous(), weight_squares = weight_squares_.contiguous();
  const Tensor update_squares = update_squares_.contiguous();
  const auto shapes = parameter_shapes(grads, row_vars);
  const auto [rows, columns] = rows_and_columns(shapes);
  const auto options = grads[0].options();
  const Tensor row_scales = at::empty({rows}, options), col_scales = at::empty({columns}, options);
  const double lr = lr_.item<double>();
  const InPlace weight(weights);
  dispatch_accumulation(grads[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<UpdatePass<T>> passes;
    for (size_t i = 0; i < grads.size(); ++i) {
      const auto rms = [&](const Tensor& squares) {
        return std::sqrt(squares.const_data_ptr<double>()[i] / num_elements[i]);
      };
      const ParameterShape& shape = shapes[i];
      passes.push_back(
          {.shape = shape,
           .factor = lr * std::max(rms(weight_squares), min_scale) / std::max(1., rms(update_squares) / clipping),
           .weight = weight.data<T>(i),
           .grad = grads[i].const_data_ptr<T>(),
           .row_var = row_vars[i].const_data_ptr<T>(),
           .col_var = col_vars[i].const_data_ptr<T>(),
           .row_scale = row_scales.mutable_data_ptr<T>() + shape.rows,
           .col_scale = col_scales.mutable_data_ptr<T>() + shape.columns,
           .row_means = row_means.const_data_ptr<double>() + shape.matrices});
    }
    run_passes(passes);
  });
  weight.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("adafactor_sums", sums);
  m.impl("adafactor_stats_", stats_);
  m.impl("adafactor_update_squares", update_squares);
  m.impl("adafactor_apply_", apply_);
  m.impl("squared_norm", squared_norm);
}

}  // namespace glam::cpu
