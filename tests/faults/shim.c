// Calls of the C library that write, failing when told to. Preloaded; does nothing until fault_arm is called.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ONCE, FOR_GOOD, KILL };

static atomic_int armed, seen, first, mode, error_number;
static char wanted[64], unwanted[64];

// From now on, of the calls on paths that hold `part` but not `except`, number `n` (from 0) fails with `error`: it alone, or
// it and all after it; or the process is killed there. n = -1 only counts.
void fault_arm(const char *part, const char *except, int n, int how, int error) {
    strncpy(wanted, part, sizeof wanted - 1);
    strncpy(unwanted, except, sizeof unwanted - 1);
    first = n;
    mode = how;
    error_number = error;
    seen = 0;
    armed = 1;
}

int fault_seen(void) { return seen; }

static int fails(const char *path) {
    if (!armed || !strstr(path, wanted) || (unwanted[0] && strstr(path, unwanted))) return 0;
    int number = seen++;
    if (first < 0 || number < first || (mode != FOR_GOOD && number > first)) return 0;
    if (mode == KILL) kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}

static int fails_fd(int fd) {
    if (!armed) return 0;
    char link[64], path[1024];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    return fails_fd(fd) ? -1 : real(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    return fails_fd(fd) ? -1 : real(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    return fails_fd(fd) ? -1 : real(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return fails_fd(fd) ? -1 : real(fd, parts, count);
}

int fsync(int fd) {
    REAL(fsync);
    return fails_fd(fd) ? -1 : real(fd);
}

int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    return fails_fd(fd) ? -1 : real(fd, size);
}

int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    return fails_fd(fd) ? -1 : real(fd, size);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return fails(to) ? -1 : real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    return fails(to) ? -1 : real(a, from, b, to);
}

int mkdir(const char *path, mode_t bits) {
    REAL(mkdir);
    return fails(path) ? -1 : real(path, bits);
}

static int creates(int flags) { return flags & (O_CREAT | O_WRONLY | O_RDWR); }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return creates(flags) && fails(path) ? -1 : real(path, flags, bits); \
    }

OPEN(open)
OPEN(open64)

FILE *fopen(const char *path, const char *how) {
    REAL(fopen);
    return how[0] != 'r' && fails(path) ? NULL : real(path, how);
}

FILE *fopen64(const char *path, const char *how) {
    REAL(fopen64);
    return how[0] != 'r' && fails(path) ? NULL : real(path, how);
}
