// Trains a GLaM without Python, alone or as one of several processes that share the experts: the token files, the order
// of the data, the loss and the optimiser are those of the Python trainer, and so are the numbers.
//
// Letters: B rows, S positions, M micro-batches of each of W processes, E experts.

#include <glam/data.h>
#include <glam/distributed.h>
#include <glam/load.h>
#include <glam/nn.h>
#include <glam/ops.h>
#include <glam/optim.h>
#include <glam/save.h>
#include <torch/torch.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <iostream>

#include "options.h"
#include "processes.h"

namespace {

using torch::Tensor;

// Everything that is trained, and how: built once.
struct Training {
  const Options& options;
  const Processes& processes;
  glam::nn::GLaM model;
  glam::optim::NamedTensors parameters;
  glam::optim::Shards shards;
  glam::distributed::GradientReducer reducer;
  glam::optim::Adafactor optimizer;

  Training(const Options& options, const Processes& processes)
      : options(options),
        processes(processes),
        model(options.config, options.seed, torch::kCPU,
              glam::nn::ExpertParallel{.group = processes.expert(), .chunks = options.exchange_chunks}),
        parameters(named_parameters(model)),
        shards(expert_shards(model)),
        reducer(reduced_parameters(model, processes)),
        optimizer(parameters, {.min_factored = options.min_factored}, shards) {
    model->train();
  }

  static glam::optim::NamedTensors named_parameters(const glam::nn::GLaM& model) {
    glam::optim::NamedTensors parameters;
    for (const auto& item : model->named_parameters()) parameters.emplace_back(item.key(), item.value());
    return parameters;
  }

  // Experts are a part of the whole, along their first dimension: norms and means are those of the whole.
  static glam::optim::Shards expert_shards(const glam::nn::GLaM& model) {
    glam::optim::Shards shards;
    if (model->parallel().group.empty()) return shards;
    for (const auto& item : model->expert_parameters()) {
      shards[item.key()] = {{.dim = -3, .size = model->config().num_experts, .group = model->parallel().group}};
    }
    return shards;
  }

  // Gradients of experts are summed over the processes that hold the same ones, all others over all processes.
  static std::vector<glam::distributed::ReducedParameter> reduced_parameters(const glam::nn::GLaM& model,
                                                                             const Processes& processes) {
    const auto experts = model->expert_parameters();
    std::vector<glam::distributed::ReducedParameter> reduced;
    for (const auto& item : model->named_parameters()) {
      reduced.push_back({item.value(), experts.contains(item.key()) ? processes.data() : processes.world()});
    }
    return reduced;
  }
};

// What a step says of itself, float64 []; `nll` is a sum, and both are of this process alone.
struct Sums {
  Tensor nll, aux;
};

// Adds the gradient of
//
//   sum loss_sum / N + aux_loss_weight * sum aux / (M W) + router_z_loss * sum router_z / N
//
// to the parameters' gradients, where N is the number of real tokens of the whole batch: sums over all processes and
// micro-batches, never means of means.
Sums accumulate_gradients(Training& training, const glam::data::Share& share, int64_t step) {
  const auto& config = training.model->config();
  const auto& [batch, num_rows, share_num_real, first_row] = share;
  const int64_t here = batch.tokens.size(0), S = batch.tokens.size(1);
  const int64_t size = training.options.micro_batch_size > 0 ? training.options.micro_batch_size : here;
  const int64_t num_real = std::max<int64_t>(share_num_real, 1);
  const auto num_parts = static_cast<double>(num_rows / size);
  const auto zero = torch::zeros({}, torch::kDouble);
  Sums sums{zero, zero};
  for (int64_t first = 0; first < here; first += size) {
    const auto part = [&](const Tensor& tensor) { return tensor.narrow(0, first, size); };
    const Tensor weights = part(batch.weights);
    const auto loss =
        training.model->loss(part(batch.tokens), part(batch.targets), weights, part(batch.segment_ids),
                             {.seed = training.options.seed, .step = step, .first_token = (first_row + first) * S});
    Tensor total = loss.loss_sum / num_real;
    if (config.num_moe_layers() > 0) {
      total = total + config.aux_loss_weight / num_parts * loss.aux;
      if (config.router_z_loss != 0) {
        total = total + config.router_z_loss / static_cast<double>(num_real) * loss.router_z;
      }
    }
    if (first + size == here) training.reducer.start();  // sums over the processes while this last pass runs
    {
      const glam::AccumulateInPlace in_place;
      total.backward();
    }
    sums.nll = sums.nll + glam::ordered_sum(torch::where(weights != 0, loss.nll.detach().to(torch::kDouble), zero));
    sums.aux = sums.aux + loss.aux.detach().to(torch::kDouble) / num_parts;
  }
  training.reducer.finish();
  return sums;
}

// Applies the gradients and clears them; returns their norm. A step with a gradient that is not finite changes nothing.
Tensor update(Training& training) {
  const auto [norm, nonfinite] = glam::optim::gradient_statistics(training.parameters, training.shards);
  if (training.options.clip_norm > 0) {
    glam::optim::clip_gradients_(training.model->parameters(), norm, training.options.clip_norm);
  }
  const Tensor rate = glam::optim::glam_schedule(training.optimizer.step_count(), training.options.multiplier,
                                                 training.options.constant_steps);
  training.optimizer.step(rate, nonfinite);
  training.optimizer.zero_grad();
  return norm;
}

// The steps since the last line, and the line: means per real token and per step, over all processes.
class Log {
 public:
  void add(const Sums& sums, const Tensor& norm, int64_t num_real) {
    sums_ = sums_ + torch::stack({sums.nll, sums.aux});
    norm_ = norm_ + norm;
    tokens_ += num_real;
    ++steps_;
  }

  void line(const Processes& processes, int64_t step, int64_t num_steps) {
    const Tensor sums = glam::ordered_all_reduce(sums_, processes.world());
    const double loss = sums[0].item<double>() / static_cast<double>(tokens_);
    const double aux = sums[1].item<double>() / static_cast<double>(steps_);
    const double norm = norm_.item<double>() / static_cast<double>(steps_);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start_;
    if (processes.rank() == 0) {
      std::printf("step %lld/%lld  loss %.9f  aux %.9f  grad_norm %.9f  %.0f tokens/s\n", static_cast<long long>(step),
                  static_cast<long long>(num_steps), loss, aux, norm, static_cast<double>(tokens_) / seconds.count());
      std::fflush(stdout);
    }
    *this = Log();
  }

 private:
  Tensor sums_ = torch::zeros({2}, torch::kDouble), norm_ = torch::zeros({}, torch::kDouble);
  int64_t tokens_ = 0, steps_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

void check_data(const Options& options, const glam::data::TokenFolder& data, const Processes& processes) {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument("expected " + what);
  };
  const int64_t W = processes.world_size(), size = options.micro_batch_size;
  require(options.out.empty() || !std::filesystem::exists(options.out), "--out not to exist yet: " + options.out);
  require(data.vocab_size() <= options.config.vocab_size,
          "a vocabulary of at least the " + std::to_string(data.vocab_size()) + " tokens of " + options.data +
              ", got " + std::to_string(options.config.vocab_size));
  require(options.batch_size % W == 0, "--batch-size to be a multiple of the " + std::to_string(W) +
                                           " processes, got " + std::to_string(options.batch_size));
  require(size == 0 || options.batch_size / W % size == 0, "--micro-batch-size to divide the " +
                                                               std::to_string(options.batch_size / W) +
                                                               " rows of a process, got " + std::to_string(size));
}

void run(const Options& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);

  // 1. Who there is, the data, the model.
  const Processes processes(options.expert);
  const glam::data::TokenFolder data(options.data);
  check_data(options, data, processes);
  Training training(options, processes);
  glam::data::BatchSampler sampler(data, options.batch_size, static_cast<uint64_t>(options.seed), processes.rank(),
                                   processes.world_size());

  // 2. The steps.
  Log log;
  for (int64_t step = 0; step < options.steps; ++step) {
    const auto share = sampler.next();
    const Sums sums = accumulate_gradients(training, share, step);
    log.add(sums, update(training), share.num_real);
    if ((step + 1) % options.log_interval == 0 || step + 1 == options.steps)
      log.line(processes, step + 1, options.steps);
  }

  // 3. The weights.
  if (options.out.empty()) return;
  glam::save_model(training.model, options.out, "{\"tokenizer_hash\": \"" + data.tokenizer_hash() + "\"}",
                   processes.world());
  if (processes.rank() == 0) std::printf("saved %s\n", options.out.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse_options({argv + 1, argv + argc});
    if (options.help) {
      std::cout << usage();
    } else {
      run(options);
    }
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "train: " << error.what_without_backtrace() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "train: " << error.what() << '\n';
  }
  return 1;
}
