/* What programs take from a glibc newer than 2.28 if they are linked to one, for systems that have an older one.

   Weak, since each -lm on a linker's line brings this file; hidden, so that it is nobody else's. */

#define _GNU_SOURCE
#define OWN __attribute__((weak, visibility("hidden")))

/* In 2.29 these got second versions, which report errors in another way. Here is a way to the first ones. */
#define FIRST(name, parameters, arguments)                                   \
    double first_##name parameters;                                          \
    __asm__(".symver first_" #name ", " #name "@" FIRST_VERSION);            \
    OWN double name parameters { return first_##name arguments; }

FIRST(exp, (double x), (x))
FIRST(exp2, (double x), (x))
FIRST(log, (double x), (x))
FIRST(log2, (double x), (x))
FIRST(pow, (double x, double y), (x, y))

/* New in 2.30. Rust's library can do without, which the linker does not write down. */
#include <sys/syscall.h>
#include <unistd.h>

OWN pid_t gettid(void) { return syscall(SYS_gettid); }

/* New in 2.29: how a program is started in another folder. No program of the archives does that, but a tool that is
   built here does. */
#include <dlfcn.h>
#include <errno.h>
#include <spawn.h>

OWN int posix_spawn_file_actions_addchdir_np(posix_spawn_file_actions_t *actions, const char *folder) {
    int (*newer)(posix_spawn_file_actions_t *, const char *) =
        (int (*)(posix_spawn_file_actions_t *, const char *))dlsym(RTLD_NEXT, "posix_spawn_file_actions_addchdir_np");
    return newer ? newer(actions, folder) : ENOSYS;
}
