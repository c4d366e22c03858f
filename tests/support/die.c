/* Ends the process it is loaded into by SIGKILL just before its N-th change to anything that outlasts
 * it: a file made, written, renamed, removed, or a program started. For tests, by LD_PRELOAD:
 *
 *   DIE_AT=N     which one, counted from 1 over all threads; 0: none
 *   DIE_LOG=PATH a line for each, numbered
 *
 * Children don't have it: it takes itself out of the environment.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long passed;
static long die_at;
static int log_to = -1;

__attribute__((constructor)) static void begin(void) {
    const char *at = getenv("DIE_AT"), *path = getenv("DIE_LOG");
    die_at = at ? atol(at) : 0;
    if (path)
        log_to = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    unsetenv("LD_PRELOAD");
    unsetenv("DIE_AT");
    unsetenv("DIE_LOG");
}

static void pass(const char *what, const char *on) {
    long number = atomic_fetch_add(&passed, 1) + 1;
    if (log_to >= 0) {
        char line[5000];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", number, what, on);
        syscall(SYS_write, log_to, line, (size_t)length);
    }
    if (number == die_at) {
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;)
            pause();
    }
}

/* A write counts if it goes into a file: pipes and sockets end with us. */
static void pass_write(const char *what, int fd) {
    struct stat meta;
    if (fstat(fd, &meta) != 0 || !S_ISREG(meta.st_mode))
        return;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    pass(what, path);
}

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) \
        next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int makes(int flags) { return (flags & (O_CREAT | O_TRUNC)) != 0; }

int open64(const char *path, int flags, ...) {
    NEXT(open64);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    if (makes(flags))
        pass("open", path);
    return next(path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...) {
    NEXT(openat64);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    if (makes(flags))
        pass("openat", path);
    return next(dir, path, flags, mode);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    NEXT(write);
    pass_write("write", fd);
    return next(fd, bytes, count);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    NEXT(writev);
    pass_write("writev", fd);
    return next(fd, parts, count);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) {
    NEXT(pwrite64);
    pass_write("pwrite", fd);
    return next(fd, bytes, count, at);
}

int ftruncate64(int fd, off64_t length) {
    NEXT(ftruncate64);
    pass_write("ftruncate", fd);
    return next(fd, length);
}

int rename(const char *from, const char *to) {
    NEXT(rename);
    pass("rename", to);
    return next(from, to);
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    NEXT(linkat);
    pass("link", to);
    return next(from_dir, from, to_dir, to, flags);
}

int unlink(const char *path) {
    NEXT(unlink);
    pass("unlink", path);
    return next(path);
}

int unlinkat(int dir, const char *path, int flags) {
    NEXT(unlinkat);
    pass("unlinkat", path);
    return next(dir, path, flags);
}

int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    pass("mkdir", path);
    return next(path, mode);
}

int rmdir(const char *path) {
    NEXT(rmdir);
    pass("rmdir", path);
    return next(path);
}

int chmod(const char *path, mode_t mode) {
    NEXT(chmod);
    pass("chmod", path);
    return next(path, mode);
}

/* Twice: before the program starts, and while it does. */
int posix_spawnp(pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
                 const posix_spawnattr_t *attributes, char *const *argv, char *const *env) {
    NEXT(posix_spawnp);
    pass("spawn", file);
    int result = next(pid, file, actions, attributes, argv, env);
    pass("spawned", file);
    return result;
}

pid_t fork(void) {
    NEXT(fork);
    pass("fork", "");
    pid_t pid = next();
    if (pid > 0)
        pass("forked", "");
    return pid;
}
