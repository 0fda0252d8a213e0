// Token folders and training batches, without Python: the files that glam_ext.data writes, in the order in which the
// Python trainer reads them.
//
// Letters: N rows of the folder, B rows of a batch, S positions. A folder holds tokens.bin, targets.bin (little-endian
// uint16 or uint32, [N, S]), segment_ids.bin (uint16, 0 = padding) and manifest.json.
#pragma once

#include <ATen/core/Tensor.h>
#include <glam/checkpoint.h>

#include <filesystem>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace glam::data {

// A token folder that cannot be used. The message names the file and says what to do.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Batch {
  at::Tensor tokens, targets;  // int64 [B, S]
  at::Tensor weights;          // float32 [B, S]: 0 on padding, 1 elsewhere
  at::Tensor segment_ids;      // int32 [B, S], 0 on padding
};

// A token folder opened for reading. The files are mapped: nothing is loaded until it is used.
class TokenFolder {
 public:
  // Checks the manifest and the files' sizes and, with kHashes, reads every byte once. Throws DataError.
  explicit TokenFolder(const std::filesystem::path& folder, Verify verify = Verify::kHashes);
  ~TokenFolder();
  TokenFolder(TokenFolder&&) noexcept;

  int64_t num_rows() const { return num_rows_; }
  int64_t sequence_length() const { return sequence_length_; }
  int64_t vocab_size() const { return vocab_size_; }
  int64_t num_targets() const { return num_targets_; }  // real positions, one end of text per document included
  int64_t utf8_bytes() const { return utf8_bytes_; }    // of the text
  const std::string& tokenizer_hash() const { return tokenizer_hash_; }

  // Copies of rows, in the given order. Throws std::out_of_range for an index outside [0, N).
  Batch rows(std::span<const int64_t> indices) const;
  // How many positions of these rows are not padding.
  int64_t count_real(std::span<const int64_t> indices) const;

 private:
  class Array;
  void check_indices(std::span<const int64_t> indices) const;

  int64_t num_rows_ = 0, sequence_length_ = 0, vocab_size_ = 0, num_targets_ = 0, utf8_bytes_ = 0;
  std::string tokenizer_hash_;
  std::unique_ptr<const Array> tokens_, targets_, segment_ids_;
};

// A permutation of the rows 0 ... num_rows - 1 that is a function of (seed, epoch) alone: sorted by a hash of the index.
std::vector<int64_t> epoch_order(uint64_t seed, int64_t epoch, int64_t num_rows);

// A rank's part of a batch, and what it is a part of.
struct Share {
  Batch batch;
  int64_t num_rows;   // of the whole batch
  int64_t num_real;   // its targets of non-zero weight, all ranks' together
  int64_t first_row;  // of this part
};

// The endless sequence of training batches. Sample i is row epoch_order(seed, i / N)[i mod N]; a step takes the next
// batch_size samples and rank r the r-th of as many equal parts as there are ranks. So a step's data depend on (seed,
// samples so far, batch_size) alone.
class BatchSampler {
 public:
  // The folder must outlive the sampler. Throws std::invalid_argument where batch_size is no multiple of world_size.
  BatchSampler(const TokenFolder& folder, int64_t batch_size, uint64_t seed = 0, int64_t rank = 0,
               int64_t world_size = 1, bool shuffle = true);

  // Moves on by batch_size samples.
  Share next();
  // Samples of all ranks taken so far: what a run that goes on has to know.
  int64_t samples() const { return samples_; }
  void set_samples(int64_t samples) { samples_ = samples; }

 private:
  int64_t row_of(int64_t sample);

  const TokenFolder& folder_;
  int64_t batch_size_;
  uint64_t seed_;
  int64_t rank_, world_size_;
  bool shuffle_;
  int64_t samples_ = 0;
  int64_t epoch_ = -1;  // that of order_
  std::vector<int64_t> order_;
};

}  // namespace glam::data
