#include "ops/collectives.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace glam::collectives {
namespace {

// By the boxed call: the C++ type of the group argument differs between releases, a string value is always accepted.
Tensor call_and_wait(const char* name, std::vector<c10::IValue> arguments) {
  auto& dispatcher = c10::Dispatcher::singleton();
  dispatcher.findSchemaOrThrow(name, "").callBoxed(&arguments);
  std::vector<c10::IValue> pending = {arguments[0]};
  dispatcher.findSchemaOrThrow("_c10d_functional::wait_tensor", "").callBoxed(&pending);
  return pending[0].toTensor();
}

}  // namespace

int64_t group_size(const std::string& group) {
  return group.empty() ? 1 : c10d::resolve_process_group(group)->getSize();
}

Tensor all_reduce(const Tensor& tensor, const std::string& operation, const std::string& group) {
  return call_and_wait("_c10d_functional::all_reduce", {tensor.contiguous(), operation, group});
}

Tensor all_to_all(const Tensor& rows, c10::SymIntArrayRef out_splits, c10::SymIntArrayRef in_splits,
                  const std::string& group) {
  return call_and_wait("_c10d_functional::all_to_all_single",
                       {rows.contiguous(), out_splits.vec(), in_splits.vec(), group});
}

}  // namespace glam::collectives
