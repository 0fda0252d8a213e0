// JSON text to value, refusing a key that occurs twice in one object (which nlohmann/json would silently merge).
//
// Throws std::invalid_argument; the caller adds what was being read. Private to the core: nothing installed includes it.
#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace glam {

// The parser quotes the bytes it stopped at, which need not be UTF-8, while messages must be.
inline std::string printable(std::string text) {
  for (char& character : text) {
    if (static_cast<unsigned char>(character) < 0x20 || static_cast<unsigned char>(character) > 0x7e) character = '?';
  }
  return text;
}

template <class Json>
Json parse_strict_json(std::string_view text) {
  std::vector<std::set<std::string>> seen;  // the keys of every object that is open
  const auto watch = [&](int, typename Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) seen.emplace_back();
    if (event == Json::parse_event_t::object_end) seen.pop_back();
    if (event == Json::parse_event_t::key && !seen.back().insert(parsed.template get<std::string>()).second) {
      throw std::invalid_argument("key " + parsed.dump() + " is given twice; remove one");
    }
    return true;
  };
  try {
    return Json::parse(text, watch);
  } catch (const typename Json::exception& error) {
    throw std::invalid_argument("not JSON: " + printable(error.what()));
  }
}

}  // namespace glam
