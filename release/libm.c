/* In glibc 2.29, these functions got new versions, which older systems lack. This is the link from a program
   that calls them to the first versions, which every system has. They differ in how errors are reported. */

#define FIRST(name, parameters, arguments)                                   \
    double first_##name parameters;                                          \
    __asm__(".symver first_" #name ", " #name "@" FIRST_VERSION);            \
    __attribute__((visibility("hidden"))) double name parameters {           \
        return first_##name arguments;                                       \
    }

FIRST(exp, (double x), (x))
FIRST(exp2, (double x), (x))
FIRST(log, (double x), (x))
FIRST(log2, (double x), (x))
FIRST(pow, (double x, double y), (x, y))
