# CMake's view of the targets that tools/cross/c++ compiles for.
if("$ENV{CROSS_TARGET}" STREQUAL "macos-arm64")
  set(CMAKE_SYSTEM_NAME Darwin)
  set(CMAKE_SYSTEM_VERSION 23.0.0)
  set(CMAKE_SYSTEM_PROCESSOR arm64)
  # The target is in the compiler; there is no SDK.
  set(CMAKE_OSX_SYSROOT "" CACHE STRING "")
  set(CMAKE_OSX_ARCHITECTURES "" CACHE STRING "")
  set(CMAKE_OSX_DEPLOYMENT_TARGET "" CACHE STRING "")
  # Must never run: a change after the link breaks the signature.
  set(CMAKE_INSTALL_NAME_TOOL /bin/false CACHE FILEPATH "")
  set(CMAKE_SHARED_MODULE_SUFFIX .so)
else()
  set(CMAKE_SYSTEM_NAME Linux)
  string(REPLACE "linux-" "" CMAKE_SYSTEM_PROCESSOR "$ENV{CROSS_TARGET}")
endif()
set(CMAKE_CXX_COMPILER "${CMAKE_CURRENT_LIST_DIR}/c++")
set(CMAKE_AR "${CMAKE_CURRENT_LIST_DIR}/ar" CACHE FILEPATH "")
set(CMAKE_RANLIB "${CMAKE_CURRENT_LIST_DIR}/ranlib" CACHE FILEPATH "")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_SKIP_RPATH ON)
# Nothing here is a module, and zig has no scanner for them.
set(CMAKE_CXX_SCAN_FOR_MODULES OFF)
