// Numbers that a user wrote.
#pragma once

#include <charconv>
#include <optional>
#include <string>

// Nothing unless the whole text is a number.
template <class Number>
std::optional<Number> to_number(const std::string& text) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}
