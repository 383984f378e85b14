# SPDX-License-Identifier: Apache-2.0
# Finds the stable-ABI headers of the torch that is installed in the environment pip installs into.
#
# pip's build isolation hides that torch from `import`, but runs the same interpreter, whose site-packages are asked
# for the file instead. Defines TorchStable::headers. Set RAZOR_TORCH_INCLUDE to name the directory yourself.
set(RAZOR_TORCH_INCLUDE "" CACHE PATH "Directory that holds torch/csrc/stable/library.h (default: ask Python)")
set(TorchStable_INCLUDE_DIR "${RAZOR_TORCH_INCLUDE}")
if(NOT TorchStable_INCLUDE_DIR)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c [[
import os, site, sysconfig
folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages(), site.getusersitepackages()]
includes = [os.path.join(folder, "torch", "include") for folder in folders]
print(next((i for i in includes if os.path.isfile(os.path.join(i, "torch/csrc/stable/library.h"))), ""))
]] OUTPUT_VARIABLE TorchStable_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${TorchStable_INCLUDE_DIR}/torch/csrc/stable/library.h")
  message(FATAL_ERROR "razor-attention: PyTorch headers not found for ${Python_EXECUTABLE}.\n"
    "Install torch first, in its own step, then this package:\n    pip install 'torch>=2.10'\n    pip install .\n"
    "A front end that builds in a separate environment (build, uv) needs its no-isolation option, or "
    "RAZOR_TORCH_INCLUDE=<dir>/torch/include.")
endif()
file(STRINGS "${TorchStable_INCLUDE_DIR}/torch/headeronly/version.h" TorchStable_VERSION
  REGEX "define TORCH_VERSION_M(AJOR|INOR) ")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*" "\\1.\\2" TorchStable_VERSION "${TorchStable_VERSION}")
if(TorchStable_VERSION VERSION_LESS TorchStable_FIND_VERSION)
  message(FATAL_ERROR "razor-attention: torch >= ${TorchStable_FIND_VERSION} is required, "
    "found headers of ${TorchStable_VERSION} in ${TorchStable_INCLUDE_DIR}")
endif()
message(STATUS "torch ${TorchStable_VERSION} headers: ${TorchStable_INCLUDE_DIR}")
set(TorchStable_FOUND TRUE)
if(NOT TARGET TorchStable::headers)
  add_library(TorchStable::headers INTERFACE IMPORTED)
  target_include_directories(TorchStable::headers SYSTEM INTERFACE "${TorchStable_INCLUDE_DIR}")
endif()
