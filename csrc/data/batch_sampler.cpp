#include <algorithm>

#include "glam/data.h"

namespace glam::data {
namespace {

// The output of splitmix64 for a state. Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators,
// OOPSLA 2014; the constants are those of Java's SplittableRandom.
uint64_t mix(uint64_t value) {
  value += 0x9E3779B97F4A7C15;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

}  // namespace

std::vector<int64_t> epoch_order(uint64_t seed, int64_t epoch, int64_t num_rows) {
  const uint64_t key = mix(mix(seed) + static_cast<uint64_t>(epoch));
  std::vector<std::pair<uint64_t, int64_t>> hashed(static_cast<size_t>(num_rows));
  for (size_t row = 0; row < hashed.size(); ++row) hashed[row] = {mix(key + row), static_cast<int64_t>(row)};
  std::ranges::sort(hashed);
  std::vector<int64_t> order(hashed.size());
  std::ranges::transform(hashed, order.begin(), [](const auto& item) { return item.second; });
  return order;
}

BatchSampler::BatchSampler(const TokenFolder& folder, int64_t batch_size, uint64_t seed, int64_t rank,
                           int64_t world_size, bool shuffle)
    : folder_(folder), batch_size_(batch_size), seed_(seed), rank_(rank), world_size_(world_size), shuffle_(shuffle) {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument("BatchSampler: expected " + what);
  };
  require(rank >= 0 && rank < world_size,
          "rank in [0, " + std::to_string(world_size) + "), got " + std::to_string(rank));
  require(batch_size >= 1 && batch_size % world_size == 0,
          "batch_size to be a multiple of world_size = " + std::to_string(world_size) + " above 0, got " +
              std::to_string(batch_size));
  require(folder.num_rows() >= 1, "a token folder with at least one row, got none");
}

// Every rank reads the segment ids of the whole batch, so that all know its number of real targets and none has to ask.
Share BatchSampler::next() {
  std::vector<int64_t> rows(static_cast<size_t>(batch_size_));
  for (int64_t& row : rows) row = row_of(samples_++);
  const int64_t num_rows = batch_size_ / world_size_, first = rank_ * num_rows;
  const auto mine = std::span(rows).subspan(static_cast<size_t>(first), static_cast<size_t>(num_rows));
  return {
      .batch = folder_.rows(mine), .num_rows = batch_size_, .num_real = folder_.count_real(rows), .first_row = first};
}

int64_t BatchSampler::row_of(int64_t sample) {
  const int64_t epoch = sample / folder_.num_rows(), offset = sample % folder_.num_rows();
  if (!shuffle_) return offset;
  if (epoch != epoch_) {
    order_ = epoch_order(seed_, epoch, folder_.num_rows());
    epoch_ = epoch;
  }
  return order_[static_cast<size_t>(offset)];
}

}  // namespace glam::data
