# Builds ggml without llama.cpp's own library, which nothing but benches/llama_cpp calls: a quarter of the time.
# And in shared libraries, its core without OpenMP.
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
        if("${folder}" STREQUAL "ggml" AND GGML_BACKEND_DL)
            # Programs would load libgomp with ggml's core, before kernels/src/openmp.rs says how long it waits.
            # The core uses it for tables of IQ types that nothing here has; ggml's modules load it in time.
            foreach(property COMPILE_DEFINITIONS LINK_LIBRARIES)
                get_target_property(values ggml-base ${property})
                list(FILTER values EXCLUDE REGEX "OPENMP|OpenMP")
                set_property(TARGET ggml-base PROPERTY ${property} "${values}")
            endforeach()
        endif()
    endmacro()
endif()
# For tests of GPUs: one module for CPUs that have AVX2 in place of one for each generation, 14 in all.
if(PROJECT_NAME STREQUAL "llama.cpp" AND DEFINED ENV{OPENVLA_ONE_CPU})
    set(GGML_CPU_ALL_VARIANTS OFF CACHE BOOL "" FORCE)
endif()
# For ThreadSanitizer, which knows ggml's own barriers and not OpenMP's: see tests/sanitizers.
if(PROJECT_NAME STREQUAL "llama.cpp" AND DEFINED ENV{OPENVLA_NO_OPENMP})
    set(GGML_OPENMP OFF CACHE BOOL "" FORCE)
endif()
