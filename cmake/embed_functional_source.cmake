# Run as `cmake -DINPUT=functional.py -DOUTPUT=functional_source.cpp -P` at build time; see GlamFunctionalSource.cmake.
# A byte array, not a string literal: nothing to escape and no limit on its length.

set(bytes "")
if(INPUT)
  file(READ ${INPUT} text HEX)
  string(HEX "# --- begin\n" begin_mark)
  string(HEX "# --- end" end_mark)
  string(FIND "${text}" "${begin_mark}" begin)
  string(FIND "${text}" "${end_mark}" end)
  if(begin EQUAL -1 OR end EQUAL -1 OR end LESS begin)
    message(FATAL_ERROR "glam: expected ${INPUT} to have a line `# --- begin` and, after it, a line `# --- end`")
  endif()
  string(LENGTH "${begin_mark}" mark_length)
  math(EXPR begin "${begin} + ${mark_length}")
  math(EXPR length "${end} - ${begin}")
  string(SUBSTRING "${text}" ${begin} ${length} text)
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${text}")
endif()
file(WRITE ${OUTPUT} "#include \"export/functional_source.h\"
namespace glam {
namespace {
const char kBytes[] = {${bytes}0};
}
const char* const kFunctionalSource = kBytes;
}  // namespace glam
")
