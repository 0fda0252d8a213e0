// The product core of one format (GLAM_FORMAT): products of operands of every kind against double, and the promise that
// an element's bits depend on its row and column alone, however many rows there are and however they are stored. Prints the
// largest relative error and a checksum of all bits.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/kernels/gemm_functions.h"
#include "format.h"
#include "ops/packed_layout.h"

using glam::cpu::DepthPart;
using glam::cpu::Operand;
using glam::cpu::Output;
using glam::cpu::Type;

namespace {

const auto functions = kernels::GemmEntries<Format>::functions();
std::mt19937 generator(1);
uint64_t checksum = 0;

// A matrix [outer][depth] and the ways in which an operand can hold it.
struct Matrix {
  int64_t outer, depth;
  std::vector<double> exact;  // rounded to bfloat16 if the format does that
  std::vector<Sum> values;    // of the layout
  std::vector<uint16_t> halves;
  std::vector<int32_t> order;  // the row of the data for each row of the operand
  std::vector<char> strips;    // of weights packed for inference
  Operand operand;

  Matrix(int64_t outer_, int64_t depth_, bool rows_are_k, bool in_halves, bool gathered)
      : outer(outer_), depth(depth_), exact(outer * depth) {
    const int64_t rows = rows_are_k ? depth : outer, columns = rows_are_k ? outer : depth;
    values.resize(rows * columns);
    halves.resize(rows * columns);
    std::normal_distribution<Sum> normal;
    for (int64_t i = 0; i < rows * columns; ++i) {
      halves[i] = kernels::float_to_bf16(static_cast<float>(values[i] = normal(generator)));
    }
    for (int64_t i = 0; i < rows; ++i) order.push_back(static_cast<int32_t>(i * 7 % rows));
    for (int64_t i = 0; i < outer; ++i) {
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t row = rows_are_k ? k : i, column = rows_are_k ? i : k;
        const int64_t index = (gathered ? order[row] : row) * columns + column;
        exact[i * depth + k] = kIsBf16 ? kernels::bf16_to_float(halves[index]) : values[index];
      }
    }
    const bool use_halves = kIsBf16 && in_halves;
    operand.data = use_halves ? static_cast<const void*>(halves.data()) : values.data();
    operand.type = use_halves ? Type::bf16 : sizeof(Sum) == 8 ? Type::f64 : Type::f32;
    operand.row_stride = columns;
    operand.rows_are_k = rows_are_k;
    if (gathered) {
      operand.row_index = order.data();
      operand.row_divisor = 1;
    }
  }
};

// A right side packed for inference; whole strips, an even depth.
Matrix stored(int64_t columns, int64_t depth, bool as_integers) {
  using glam::kScaleRows, glam::kStripColumns;
  Matrix matrix(columns, depth, false, true, false);
  const int64_t elements = (as_integers ? depth + kScaleRows : depth) * kStripColumns;
  matrix.strips.resize(columns / kStripColumns * elements * (as_integers ? 1 : 2));
  std::uniform_int_distribution<int> integer(-127, 127);
  std::uniform_real_distribution<float> scale(0.5F, 2.0F);
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t first = j / kStripColumns * elements, column = j % kStripColumns;
    const float factor = scale(generator);
    if (as_integers) reinterpret_cast<float*>(matrix.strips.data() + first)[column] = factor;
    for (int64_t k = 0; k < depth; ++k) {
      if (as_integers) {
        const int value = integer(generator);
        matrix.strips[first + (kScaleRows + k) * kStripColumns + column] = static_cast<char>(value);
        matrix.exact[j * depth + k] = static_cast<double>(factor) * value;
      } else {
        const uint16_t half = matrix.halves[j * depth + k];
        reinterpret_cast<uint16_t*>(matrix.strips.data())[first + k / 2 * 2 * kStripColumns + 2 * column + k % 2] =
            half;
        matrix.exact[j * depth + k] = kernels::bf16_to_float(half);
      }
    }
  }
  matrix.operand = {.data = matrix.strips.data(),
                    .type = as_integers ? Type::i8 : Type::bf16,
                    .row_stride = elements,
                    .stored = true};
  return matrix;
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows [begin, end) of A and B, packed.
struct Panels {
  int64_t rows, columns;  // padded
  std::vector<char> left, right;

  Panels(const Matrix& a, const Matrix& b, int64_t begin, int64_t end)
      : rows(round_up(end - begin, functions.tile_rows)),
        columns(round_up(b.outer, functions.tile_columns)),
        left(rows * functions.panel_bytes(a.depth)),
        right(columns * functions.panel_bytes(a.depth)) {
    functions.pack_a(a.operand, begin, end, a.depth, left.data());
    functions.pack_b(b.operand, 0, b.outer, a.depth, right.data());
    const void* const in_place = functions.panels_in_place(b.operand, 0, a.depth);
    if (in_place && std::memcmp(in_place, right.data(), right.size()) != 0) {
      std::printf("what is read in place is not what packing gives\n");
      std::exit(1);
    }
  }
};

// multiply(part, A's panels, sums) for all parts of the depth, `at_once` each where it can be cut.
void in_parts(const Matrix& a, int64_t begin, int64_t end, Panels& panels, int64_t at_once, auto&& multiply) {
  std::vector<Sum> sums(panels.rows * panels.columns, NAN);
  if (functions.whole_depth) at_once = a.depth;
  int64_t k = 0;
  do {
    const int64_t part_end = std::min(k + at_once, a.depth);
    functions.pack_a(from_k<Sum>(a.operand, k), begin, end, part_end - k, panels.left.data());
    multiply(DepthPart{k, part_end, a.depth, k == 0, part_end == a.depth}, sums.data());
    k = part_end;
  } while (k < a.depth);
}

// Rows [begin, end) of A times B.
std::vector<Sum> product(const Matrix& a, const Matrix& b, int64_t begin, int64_t end) {
  Panels panels(a, b, begin, end);
  std::vector<Sum> c(panels.rows * panels.columns, NAN);
  in_parts(a, begin, end, panels, 64, [&](const DepthPart& part, Sum* sums) {
    functions.multiply(end - begin, b.outer, part, panels.left.data(), panels.right.data(), sums, c.data(),
                       panels.columns);
  });
  functions.scale(b.operand, end - begin, 0, b.outer, c.data(), panels.columns);
  std::vector<Sum> result;
  for (int64_t i = 0; i < end - begin; ++i) {
    result.insert(result.end(), &c[i * panels.columns], &c[i * panels.columns] + b.outer);
  }
  return result;
}

// The product into outputs of every kind must be `c`, added or rounded, and nothing beside it.
void check_outputs(const Matrix& a, const Matrix& b, const std::vector<Sum>& c) {
  Panels panels(a, b, 0, a.outer);
  const int64_t column = 32, stride = column + round_up(b.outer, 32);
  for (const bool in_halves : {false, true}) {
    if (in_halves && sizeof(Sum) != sizeof(float)) continue;
    for (const bool accumulate : {false, true}) {
      for (const bool stream : {false, true}) {
        const int64_t elements = (a.outer + 1) * stride;
        auto* const values = static_cast<Sum*>(std::aligned_alloc(64, (elements * sizeof(Sum) + 63) / 64 * 64));
        auto* const halves = reinterpret_cast<uint16_t*>(values);
        for (int64_t i = 0; i < elements; ++i) in_halves ? void(halves[i] = 0x3f80) : void(values[i] = 1);
        const Output output = {.data = in_halves ? static_cast<void*>(halves + column) : values + column,
                               .type = in_halves          ? Type::bf16
                                       : sizeof(Sum) == 8 ? Type::f64
                                                          : Type::f32,
                               .row_stride = stride,
                               .accumulate = accumulate,
                               .stream = stream};
        in_parts(a, 0, a.outer, panels, stream ? 64 : a.depth, [&](const DepthPart& part, Sum* sums) {
          functions.multiply_into(a.outer, b.outer, part, panels.left.data(), panels.right.data(), sums, b.operand,
                                  output, 1, 0);
        });
        for (int64_t i = 0; i < elements; ++i) {
          const int64_t row = i / stride - 1, j = i % stride - column;
          const bool inside = row >= 0 && j >= 0 && j < b.outer;
          const Sum sum = inside ? c[row * b.outer + j] + (accumulate ? Sum(1) : Sum(0)) : Sum(1);
          const bool same = in_halves ? halves[i] == kernels::float_to_bf16(static_cast<float>(sum))
                                      : std::memcmp(&values[i], &sum, sizeof(sum)) == 0;
          if (!same) {
            std::printf("stored in %s%s%s, a product differs\n", in_halves ? "bfloat16" : "full precision",
                        accumulate ? ", added" : "", stream ? ", past the caches" : "");
            std::exit(1);
          }
        }
        std::free(values);
      }
    }
  }
}

// The first rows, by the kernel that reads B where it lies.
std::vector<Sum> few_rows(const Matrix& a, const Matrix& b, int64_t rows) {
  const int64_t columns = round_up(b.outer, functions.tile_columns);
  std::vector<char> left(functions.few_rows * functions.panel_bytes(a.depth));
  std::vector<Sum> c(functions.few_rows * columns, NAN);
  functions.load_few(a.operand, rows, a.depth, left.data());
  functions.multiply_few(rows, left.data(), b.operand, 0, b.outer, a.depth, c.data(), columns);
  std::vector<Sum> result;
  for (int64_t i = 0; i < rows; ++i) result.insert(result.end(), &c[i * columns], &c[i * columns] + b.outer);
  return result;
}

void expect_same(const std::vector<Sum>& rows, const Sum* among_many, const char* what) {
  if (std::memcmp(rows.data(), among_many, rows.size() * sizeof(Sum)) == 0) return;
  std::printf("rows differ when they are %s\n", what);
  std::exit(1);
}

double check(const Matrix& a, const Matrix& b) {
  const std::vector<Sum> c = product(a, b, 0, a.outer);
  for (const Sum value : c) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(value));
    checksum = (checksum ^ bits) * 0x100000001b3u;
  }
  check_outputs(a, b, c);
  double worst = 0;
  for (int64_t i = 0; i < a.outer; ++i) {
    for (int64_t j = 0; j < b.outer; ++j) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < a.depth; ++k) {
        const double term = a.exact[i * a.depth + k] * b.exact[j * a.depth + k];
        sum += term;
        size += std::fabs(term);
      }
      const double error = std::fabs(c[i * b.outer + j] - sum);
      worst = std::fmax(worst, std::isnan(error) ? INFINITY : size > 0 ? error / size : error);
    }
  }
  const int64_t row = a.outer / 2;
  expect_same(product(a, b, row, row + 1), &c[row * b.outer], "alone");
  if (functions.can_stream(a.operand, b.operand)) {
    for (const int64_t rows : {1, 2, 3, 8}) {
      if (rows <= a.outer) expect_same(few_rows(a, b, rows), c.data(), "of few");
    }
  }
  return worst;
}

}  // namespace

int main() {
  ask_for_tiles();
  double worst = 0;
  int kind = 0;
  for (const int64_t depth : {0, 1, 2, 31, 32, 33, 64, 513, 1025, 3200}) {
    for (const int64_t rows : {1, 16, 17, 32, 70}) {
      for (const int64_t columns : {1, 32, 33}) {
        kind = depth > 500 ? kind + 5 : 0;  // long ones take turns
        do {
          const Matrix a(rows, depth, kind & 1, kind & 2, kind & 4), b(columns, depth, kind & 8, kind & 2, kind & 4);
          worst = std::fmax(worst, check(a, b));
        } while (++kind % 16 != 0 && depth <= 500);
      }
    }
  }
  if constexpr (sizeof(Sum) == sizeof(float)) {
    for (const int64_t depth : {2, 32, 34, 66, 512, 1026}) {
      for (const int64_t rows : {1, 16, 17, 70}) {
        for (const int64_t columns : {32, 96, 160}) {
          for (const bool as_integers : {false, true}) {
            const Matrix a(rows, depth, false, true, false);
            worst = std::fmax(worst, check(a, stored(columns, depth, as_integers)));
          }
        }
      }
    }
  }
  std::printf("%.3g %016llx\n", worst, static_cast<unsigned long long>(checksum));
}
