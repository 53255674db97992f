# Builds ggml without llama.cpp's own library, which nothing but benches/llama_cpp calls: a quarter of the time.
#
# .cargo/config.toml sets CMAKE_PROJECT_INCLUDE to this file; llama-cpp-sys-2 hands it on to cmake, which
# reads it at the end of each project(). With the crate's feature `common`, everything is built.
if(PROJECT_NAME STREQUAL "llama.cpp" AND NOT LLAMA_BUILD_COMMON)
    file(WRITE "${CMAKE_BINARY_DIR}/empty.c" "")
    macro(add_subdirectory folder)
        if("${folder}" STREQUAL "src" AND CMAKE_CURRENT_SOURCE_DIR STREQUAL CMAKE_SOURCE_DIR)
            # The installation wants a target of this name, the crate's build script a library.
            add_library(llama STATIC "${CMAKE_BINARY_DIR}/empty.c")
        elseif("${folder}" STREQUAL "vendor" AND CMAKE_CURRENT_SOURCE_DIR STREQUAL CMAKE_SOURCE_DIR)
            # What multimodal llama.cpp needs.
        else()
            _add_subdirectory(${folder} ${ARGN})
        endif()
    endmacro()
endif()
# For tests of GPUs: one module for CPUs that have AVX2 in place of one for each generation, 14 in all.
if(PROJECT_NAME STREQUAL "llama.cpp" AND DEFINED ENV{OPENVLA_ONE_CPU})
    set(GGML_CPU_ALL_VARIANTS OFF CACHE BOOL "" FORCE)
endif()
