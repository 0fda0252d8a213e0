# CPU kernels: every file of csrc/cpu/kernels compiled once per instruction set, as an object library with -DGLAM_ISA=<name>;
# for avx512bf16 and amx only those that use their instructions.
#
# The kernels see no torch header: an inline function of torch compiled for a wide set could be the copy the linker keeps,
# and would then crash on a narrower CPU. For the same reason their symbols are hidden.

# A loop that copies must stay one: GCC would make "rep movs" of it, which takes longer to start than a row is long.
set(GLAM_KERNEL_OPTIONS -O$<IF:$<BOOL:${GLAM_SANITIZE}>,1,3> -fno-math-errno -fno-trapping-math -ffp-contract=fast
    -fno-tree-loop-distribute-patterns -Wall -Wextra)

function(glam_add_isa target isa sources)
  add_library(glam_kernels_${isa} OBJECT ${sources})
  target_include_directories(glam_kernels_${isa} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
  target_compile_definitions(glam_kernels_${isa} PRIVATE GLAM_ISA=${isa})
  target_compile_options(glam_kernels_${isa} PRIVATE ${GLAM_KERNEL_OPTIONS} ${ARGN})
  set_target_properties(glam_kernels_${isa} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:glam_kernels_${isa}>)
endfunction()

function(glam_add_kernels target)
  file(GLOB kernel_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/kernels/*.cpp)
  if(NOT kernel_sources)
    return()
  endif()
  glam_add_isa(${target} baseline "${kernel_sources}")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    set(avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd -mfma -mf16c -mprefer-vector-width=512)
    set(bf16_sources ${kernel_sources})
    list(FILTER bf16_sources INCLUDE REGEX "_bf16\\.cpp$")
    glam_add_isa(${target} avx2 "${kernel_sources}" -mavx2 -mfma -mf16c)
    glam_add_isa(${target} avx512 "${kernel_sources}" ${avx512})
    glam_add_isa(${target} avx512bf16 "${bf16_sources}" ${avx512} -mavx512bf16 -mavx512vbmi)
    # Without VBMI: CPUs with AMX convert int8 faster than they look it up.
    glam_add_isa(${target} amx "${bf16_sources}" ${avx512} -mavx512bf16 -mamx-tile -mamx-bf16)
    target_compile_definitions(${target} PRIVATE GLAM_HAVE_AVX2 GLAM_HAVE_AVX512)
  endif()
endfunction()
