// The emulator's settings: see config.h.
#include "cuda/emulator/config.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace glam::cuda::emulator {
namespace {

bool parse(std::string_view name, Order& order) {
  if (name == "forward") {
    order = Order::forward;
  } else if (name == "reverse") {
    order = Order::reverse;
  } else if (name == "random") {
    order = Order::random;
  } else {
    return false;
  }
  return true;
}

Config from_environment() {
  Config config;
  if (const char* order = std::getenv("GLAM_EMULATOR_ORDER"); order && !parse(order, config.order)) {
    throw std::runtime_error(std::string("GLAM_EMULATOR_ORDER: expected forward, reverse or random, got ") + order);
  }
  if (const char* seed = std::getenv("GLAM_EMULATOR_SEED")) config.seed = std::strtoull(seed, nullptr, 10);
  return config;
}

}  // namespace

Config& config() {
  static Config config = from_environment();
  return config;
}

}  // namespace glam::cuda::emulator

using namespace glam::cuda::emulator;

bool glam_emulator_configure(const char* order, uint64_t seed) {
  config().seed = seed;
  return parse(order, config().order);
}
