// Parts of tensors: where a file's tensors lie in the whole ones, and whether parts make up a whole.
//
// A part is a box: `offset` of its first element and `sizes`. Parts make up a tensor of N elements if no two boxes meet
// and their elements add up to N; so neither the data nor anything of the tensor's size is touched. Whatever a file
// claims is checked before it is used as a size.

#include <algorithm>
#include <limits>
#include <numeric>

#include "glam/checkpoint.h"
#include "io/strict_json.h"

namespace glam {
namespace {

using Json = nlohmann::json;
using Sizes = std::vector<int64_t>;

constexpr size_t kPiecesShown = 8;

[[noreturn]] void refuse(const std::filesystem::path& file, const std::string& what) {
  throw CheckpointError(file.string() + ": damaged: its " + kPiecesKey + " " + what +
                        "; copy the file again from its source or use another checkpoint");
}

// "[2:4, 0:16]", the box in Python's way of writing it.
std::string show_box(const PieceFacts& piece) {
  std::string text = "[";
  for (size_t dim = 0; dim < piece.sizes.size(); ++dim) {
    const int64_t begin = piece.offset[dim];
    text += (dim == 0 ? "" : ", ") + std::to_string(begin) + ":" + std::to_string(begin + piece.sizes[dim]);
  }
  return text + "]";
}

std::string show_sizes(const Sizes& sizes) {
  std::string text = "[";
  for (size_t dim = 0; dim < sizes.size(); ++dim) text += (dim == 0 ? "" : ", ") + std::to_string(sizes[dim]);
  return text + "]";
}

int64_t num_elements(const Sizes& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

// Whether the bytes of such a tensor, of the widest dtype, can be counted at all. An extent of 0 does not excuse the
// others: strides are computed from them.
bool is_countable(const Sizes& shape) {
  int64_t bytes = sizeof(double);
  return std::all_of(shape.begin(), shape.end(), [&](int64_t extent) {
    return extent >= 0 && !__builtin_mul_overflow(bytes, std::max<int64_t>(extent, 1), &bytes);
  });
}

// Why there can be no such part; empty if there can.
std::string problem_of_place(const Sizes& shape, const Sizes& offset, const Sizes& sizes) {
  if (!is_countable(shape)) return "the impossible shape " + show_sizes(shape);
  bool fits = shape.size() == sizes.size() && offset.size() == sizes.size();
  for (size_t dim = 0; fits && dim < sizes.size(); ++dim) {
    // Not offset + size <= shape: that sum could overflow.
    fits = sizes[dim] >= 0 && sizes[dim] <= shape[dim] && offset[dim] >= 0 && offset[dim] <= shape[dim] - sizes[dim];
  }
  if (fits) return "";
  return "a part " + show_sizes(sizes) + " at " + show_sizes(offset) + " that is not inside " + show_sizes(shape);
}

Json parse_pieces(const std::filesystem::path& file, const std::string& text) {
  if (text.empty() || text.front() != '{') refuse(file, "does not begin with {");
  try {
    return parse_strict_json<Json>(text);
  } catch (const std::invalid_argument& error) {
    refuse(file, std::string("cannot be read, ") + error.what());
  }
}

Sizes read_sizes(const std::filesystem::path& file, const std::string& name, const Json& place, const char* key) {
  const auto found = place.find(key);
  const auto is_size = [](const Json& value) {
    return value.is_number_unsigned() && value.get<uint64_t>() <= std::numeric_limits<int64_t>::max();
  };
  if (found == place.end() || !found->is_array() || !std::all_of(found->begin(), found->end(), is_size)) {
    refuse(file, "has no list of sizes as the " + std::string(key) + " of " + name);
  }
  return found->get<Sizes>();
}

void read_place(const std::filesystem::path& file, const std::string& name, const Json& place, Piece& piece) {
  if (!place.is_object() || place.size() != 2) refuse(file, "has no shape and offset of " + name);
  piece.shape = read_sizes(file, name, place, "shape");
  piece.offset = read_sizes(file, name, place, "offset");
  const std::string problem = problem_of_place(piece.shape, piece.offset, piece.tensor.sizes().vec());
  if (!problem.empty()) refuse(file, "gives " + name + " " + problem);
}

bool meet(const PieceFacts& a, const PieceFacts& b) {
  for (size_t dim = 0; dim < a.sizes.size(); ++dim) {
    if (a.offset[dim] + a.sizes[dim] <= b.offset[dim] || b.offset[dim] + b.sizes[dim] <= a.offset[dim]) return false;
  }
  return true;
}

// Two boxes that meet, or a pair of nullptr. Sorted by where they begin in the first dimension, so that a box is
// compared only with those that begin before it ends there.
std::pair<const PieceFacts*, const PieceFacts*> find_overlap(const std::vector<PieceFacts>& pieces) {
  std::vector<const PieceFacts*> sorted;
  for (const PieceFacts& piece : pieces) sorted.push_back(&piece);
  std::stable_sort(sorted.begin(), sorted.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
  for (size_t i = 0; i < sorted.size(); ++i) {
    for (size_t j = i + 1; j < sorted.size(); ++j) {
      const PieceFacts &a = *sorted[i], &b = *sorted[j];
      if (!a.sizes.empty() && b.offset[0] >= a.offset[0] + a.sizes[0]) break;
      if (meet(a, b)) return {&a, &b};
    }
  }
  return {nullptr, nullptr};
}

}  // namespace

std::map<std::string, Piece> read_pieces(const std::filesystem::path& file) {
  std::map<std::string, std::string> metadata;
  std::map<std::string, Piece> pieces;
  for (auto& [name, tensor] : read_safetensors(file, &metadata)) {
    pieces.emplace(name, Piece{tensor, tensor.sizes().vec(), Sizes(static_cast<size_t>(tensor.dim()), 0)});
  }
  const auto text = metadata.find(kPiecesKey);
  if (text == metadata.end()) return pieces;
  const Json places = parse_pieces(file, text->second);
  for (const auto& [name, place] : places.items()) {
    const auto found = pieces.find(name);
    if (found == pieces.end()) refuse(file, "names " + Json(name).dump() + ", which the file does not have");
    read_place(file, name, place, found->second);
  }
  return pieces;
}

std::string problem_of_pieces(const std::string& name, const std::vector<PieceFacts>& pieces) {
  if (pieces.empty()) return "tensor " + name + " is missing";
  const PieceFacts& first = pieces.front();
  for (const PieceFacts& piece : pieces) {
    const std::string problem = problem_of_place(piece.shape, piece.offset, piece.sizes);
    if (!problem.empty()) return "tensor " + name + " has " + problem + " in " + piece.holder;
  }
  int64_t held = 0;
  const int64_t wanted = num_elements(first.shape);
  for (const PieceFacts& piece : pieces) {
    if (piece.dtype != first.dtype || piece.shape != first.shape) {
      return "tensor " + name + " is " + first.dtype + " " + show_sizes(first.shape) + " in " + first.holder + " and " +
             piece.dtype + " " + show_sizes(piece.shape) + " in " + piece.holder;
    }
    const int64_t elements = num_elements(piece.sizes);
    if (elements == 0 && wanted > 0) {
      return "tensor " + name + ": the part " + show_box(piece) + " in " + piece.holder + " has no elements";
    }
    // No part is larger than the whole, so with the break below the sum cannot overflow.
    held += elements;
    if (held > wanted) break;
  }
  // A tensor without elements is whole exactly once, too.
  const bool doubled_nothing = wanted == 0 && pieces.size() > 1;
  const auto [a, b] = doubled_nothing ? std::pair(&pieces[0], &pieces[1]) : find_overlap(pieces);
  if (a != nullptr) {
    return "tensor " + name + ": the part " + show_box(*a) + " in " + a->holder + " overlaps " + show_box(*b) + " in " +
           b->holder;
  }
  if (held == wanted) return "";
  std::string parts;
  for (size_t i = 0; i < std::min(pieces.size(), kPiecesShown); ++i) {
    parts += (i == 0 ? "" : ", ") + show_box(pieces[i]) + " in " + pieces[i].holder;
  }
  if (pieces.size() > kPiecesShown) parts += ", ...";
  return "tensor " + name + " " + show_sizes(first.shape) + ": " + std::to_string(wanted - held) + " of " +
         std::to_string(wanted) + " elements are lost; there are " + parts;
}

}  // namespace glam
