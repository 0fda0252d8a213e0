#include "export/resolver.h"

#include <torch/csrc/jit/frontend/builtin_functions.h>
#include <torch/csrc/jit/frontend/error_report.h>
#include <torch/csrc/jit/frontend/sugared_value.h>
#include <torch/csrc/jit/runtime/operator.h>

#include <map>

namespace glam::jit {
namespace {

using torch::jit::GraphFunction;
using torch::jit::SourceRange;
using torch::jit::SugaredValue;
using SugaredPtr = std::shared_ptr<SugaredValue>;

// ops.glam.name
struct OpNamespace : SugaredValue {
  explicit OpNamespace(std::string name) : name_(std::move(name)) {}
  std::string kind() const override { return "op namespace"; }
  SugaredPtr attr(const SourceRange& location, GraphFunction&, const std::string& field) override {
    const auto symbol = c10::Symbol::fromQualString(name_ + "::" + field);
    if (torch::jit::getAllOperatorsFor(symbol).empty()) {
      throw torch::jit::ErrorReport(location) << "unknown op " << name_ << "::" << field;
    }
    return std::make_shared<torch::jit::BuiltinFunction>(symbol, std::nullopt);
  }

 private:
  std::string name_;
};

struct Ops : SugaredValue {
  std::string kind() const override { return "torch.ops"; }
  SugaredPtr attr(const SourceRange&, GraphFunction&, const std::string& field) override {
    return std::make_shared<OpNamespace>(field);
  }
};

struct Torch : torch::jit::BuiltinModule {
  Torch() : BuiltinModule("aten") {}
  SugaredPtr attr(const SourceRange& location, GraphFunction& function, const std::string& field) override {
    static const std::map<std::string, at::ScalarType> dtypes = {
        {"long", at::kLong}, {"bool", at::kBool}, {"float32", at::kFloat}, {"int32", at::kInt}};
    if (field == "ops") return std::make_shared<Ops>();
    if (const auto dtype = dtypes.find(field); dtype != dtypes.end()) {
      auto* const value = function.graph()->insertConstant(static_cast<int64_t>(dtype->second), location);
      return std::make_shared<torch::jit::SimpleValue>(value);
    }
    return BuiltinModule::attr(location, function, field);
  }
};

struct Functional : SugaredValue {
  explicit Functional(std::shared_ptr<torch::jit::CompilationUnit> functions) : functions_(std::move(functions)) {}
  std::string kind() const override { return "glam functional"; }
  SugaredPtr attr(const SourceRange& location, GraphFunction&, const std::string& field) override {
    auto* const function = functions_->find_function(c10::QualifiedName(c10::QualifiedName(kFunctionalPrefix), field));
    if (!function) throw torch::jit::ErrorReport(location) << "unknown function functional." << field;
    return std::make_shared<torch::jit::FunctionValue>(function);
  }

 private:
  std::shared_ptr<torch::jit::CompilationUnit> functions_;
};

class Resolver : public torch::jit::NativeResolver {
 public:
  Resolver(c10::TypePtr options_type, std::shared_ptr<torch::jit::CompilationUnit> functions)
      : options_type_(std::move(options_type)), functions_(std::move(functions)) {}
  SugaredPtr resolveValue(const std::string& name, GraphFunction& function, const SourceRange& location) override {
    if (name == "torch") return std::make_shared<Torch>();
    if (name == "functional" && functions_) return std::make_shared<Functional>(functions_);
    return NativeResolver::resolveValue(name, function, location);
  }
  c10::TypePtr resolveType(const std::string& name, const SourceRange& location) override {
    return name == "Options" ? options_type_ : NativeResolver::resolveType(name, location);
  }

 private:
  c10::TypePtr options_type_;
  std::shared_ptr<torch::jit::CompilationUnit> functions_;
};

}  // namespace

torch::jit::ResolverPtr make_resolver(c10::TypePtr options_type,
                                      std::shared_ptr<torch::jit::CompilationUnit> functions) {
  return std::make_shared<Resolver>(std::move(options_type), std::move(functions));
}

}  // namespace glam::jit
