// Nothing: CMake compiles the header that tests share along with it.
