// Counters: see counters.h. Compiled without a sanitizer's instrumentation.
#include "cuda/emulator/counters.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cuda/emulator/config.h"

namespace glam::cuda::emulator::counters {
namespace {

constexpr size_t kLanes = 32;
constexpr uintptr_t kSectorBytes = 32;
constexpr uintptr_t kBankBytes = 4;
constexpr uintptr_t kBanks = 32;

struct CountedLaunch {
  std::string kernel;
  dim3 grid, block;
  size_t shared_bytes;
};

struct Site {
  std::string kernel, file;
  unsigned line;
  bool shared;
  Access access;
  auto operator<=>(const Site&) const = default;
};

struct Totals {
  uint64_t warp_accesses = 0, bytes = 0, cost = 0, needed = 0;
};

// What the lanes of a warp have done so far of one access.
struct WarpAccess {
  std::array<uintptr_t, kLanes> addresses;
  std::array<uint32_t, kLanes> bytes{};  // 0: the lane took no part
};

// Sites as the running block sees them, found by the cheap parts of their key and numbered in the order of their first
// visit.
struct OpenSite {
  const char* file;
  unsigned line;
  bool shared;
  Access access;
  Totals* totals;
};

bool is_counting = false;
std::vector<CountedLaunch> launches;
std::map<Site, Totals> sites;

// Of the block that runs.
std::vector<OpenSite> open_sites;
std::vector<std::vector<uint32_t>> visits;               // [thread][open site]
std::unordered_map<uint64_t, WarpAccess> warp_accesses;  // by warp, open site and visit

size_t find_site(Access access, bool shared, Location here) {
  for (size_t i = 0; i < open_sites.size(); ++i) {
    const OpenSite& site = open_sites[i];
    if (site.line == here.line() && site.file == here.file_name() && site.shared == shared && site.access == access) {
      return i;
    }
  }
  const std::string file = here.file_name();
  Totals& totals = sites[{running_kernel(), file.substr(file.rfind('/') + 1), here.line(), shared, access}];
  open_sites.push_back({here.file_name(), here.line(), shared, access, &totals});
  return open_sites.size() - 1;
}

template <class T>
size_t count_distinct(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  return std::unique(values.begin(), values.end()) - values.begin();
}

// The numbers of the units of `unit` bytes that lane's access touches are appended.
void append_units(const WarpAccess& access, size_t lane, uintptr_t unit, std::vector<uintptr_t>& units) {
  if (access.bytes[lane] == 0) return;
  const uintptr_t first = access.addresses[lane], last = first + access.bytes[lane] - 1;
  for (uintptr_t u = first / unit; u <= last / unit; ++u) units.push_back(u);
}

uint64_t divide_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

void add_global(const WarpAccess& access, Totals& totals) {
  std::vector<uintptr_t> sectors, bytes;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    append_units(access, lane, kSectorBytes, sectors);
    append_units(access, lane, 1, bytes);
  }
  totals.cost += count_distinct(sectors);
  totals.needed += divide_up(count_distinct(bytes), kSectorBytes);
}

void add_shared(const WarpAccess& access, Totals& totals) {
  const uint32_t widest = *std::max_element(access.bytes.begin(), access.bytes.end());
  const size_t lanes_at_once = widest >= 16 ? kLanes / 4 : widest >= 8 ? kLanes / 2 : kLanes;
  for (size_t start = 0; start < kLanes; start += lanes_at_once) {
    std::vector<uintptr_t> words;
    for (size_t lane = start; lane < start + lanes_at_once; ++lane) append_units(access, lane, kBankBytes, words);
    const size_t distinct = count_distinct(words);
    std::array<uint32_t, kBanks> load{};
    for (size_t i = 0; i < distinct; ++i) ++load[words[i] % kBanks];
    totals.cost += *std::max_element(load.begin(), load.end());
    totals.needed += divide_up(distinct, kBanks);
  }
}

const char* name_of(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic";
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + '"';
}

std::string json_of(dim3 size) {
  return "[" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + "]";
}

}  // namespace

bool counting() { return is_counting; }

void start() {
  launches.clear();
  sites.clear();
  is_counting = watching = true;
}

void stop() { is_counting = false; }  // `watching` may stay true, which costs time and nothing else

void count_launch(const std::string& kernel, const Launch& launch) {
  if (is_counting) launches.push_back({kernel, launch.grid, launch.block, launch.shared_bytes});
}

void count_access(Access access, bool shared, const void* address, size_t bytes, Location here) {
  const size_t site = find_site(access, shared, here);
  const size_t thread = current->warp * kLanes + current->lane;
  if (visits.size() <= thread) visits.resize(thread + 1);
  if (visits[thread].size() <= site) visits[thread].resize(site + 1);
  const uint64_t visit = visits[thread][site]++;
  WarpAccess& group = warp_accesses[visit << 24 | uint64_t(site) << 8 | current->warp];
  group.addresses[current->lane] = reinterpret_cast<uintptr_t>(address);
  group.bytes[current->lane] = static_cast<uint32_t>(bytes);
}

void end_block() {
  for (const auto& [key, access] : warp_accesses) {
    const OpenSite& site = open_sites[key >> 8 & 0xffff];
    ++site.totals->warp_accesses;
    for (const uint32_t bytes : access.bytes) site.totals->bytes += bytes;
    site.shared ? add_shared(access, *site.totals) : add_global(access, *site.totals);
  }
  warp_accesses.clear();
  open_sites.clear();
  for (auto& thread : visits) thread.clear();
}

std::string json() {
  std::string text = "{\"launches\": [";
  const char* separator = "";
  for (const CountedLaunch& launch : launches) {
    text += separator + std::string("{\"kernel\": ") + quoted(launch.kernel) + ", \"grid\": " + json_of(launch.grid) +
            ", \"block\": " + json_of(launch.block) + ", \"shared_bytes\": " + std::to_string(launch.shared_bytes) +
            "}";
    separator = ", ";
  }
  text += "], \"accesses\": [";
  separator = "";
  for (const auto& [site, totals] : sites) {
    text += separator + std::string("{\"kernel\": ") + quoted(site.kernel) + ", \"file\": " + quoted(site.file) +
            ", \"line\": " + std::to_string(site.line) + ", \"space\": \"" + (site.shared ? "shared" : "global") +
            "\", \"access\": \"" + name_of(site.access) +
            "\", \"warp_accesses\": " + std::to_string(totals.warp_accesses) +
            ", \"bytes\": " + std::to_string(totals.bytes) + ", \"cost\": " + std::to_string(totals.cost) +
            ", \"needed\": " + std::to_string(totals.needed) + "}";
    separator = ", ";
  }
  return text + "]}";
}

std::string table() {
  std::map<std::tuple<std::string, std::string>, size_t> counts;
  for (const CountedLaunch& launch : launches) {
    ++counts[{launch.kernel, "grid " + json_of(launch.grid) + " block " + json_of(launch.block) + " shared " +
                                 std::to_string(launch.shared_bytes)}];
  }
  std::string text = "launches\n";
  for (const auto& [key, count] : counts) {
    text += "  " + std::to_string(count) + " x " + std::get<0>(key) + " " + std::get<1>(key) + "\n";
  }
  text += "accesses (sectors of 32 bytes in global memory, passes over the banks in shared memory)\n";
  const std::string* kernel = nullptr;
  for (const auto& [site, totals] : sites) {
    if (!kernel || *kernel != site.kernel) text += "  " + site.kernel + "\n";
    kernel = &site.kernel;
    char line[256];
    std::snprintf(line, sizeof(line),
                  "    %-32s %-6s %-6s %10llu warp accesses %12llu bytes %10llu %s, %llu needed (%.2f)\n",
                  (site.file + ":" + std::to_string(site.line)).c_str(), site.shared ? "shared" : "global",
                  name_of(site.access), static_cast<unsigned long long>(totals.warp_accesses),
                  static_cast<unsigned long long>(totals.bytes), static_cast<unsigned long long>(totals.cost),
                  site.shared ? "passes" : "sectors", static_cast<unsigned long long>(totals.needed),
                  static_cast<double>(totals.cost) / static_cast<double>(std::max<uint64_t>(totals.needed, 1)));
    text += line;
  }
  return text;
}

}  // namespace glam::cuda::emulator::counters

namespace counters = glam::cuda::emulator::counters;

void glam_emulator_start_counting() { counters::start(); }

void glam_emulator_stop_counting() { counters::stop(); }

const char* glam_emulator_report() {
  static std::string report;
  report = counters::json();
  return report.c_str();
}

const char* glam_emulator_table() {
  static std::string table;
  table = counters::table();
  return table.c_str();
}
