/* What a test changes about the machine that a process believes to be on; preloaded into the
 * daemon and, through its environment, into its runners.
 *
 *   FAULT_RECORD  a file: every write, sync and change of a name below FAULT_ROOT is appended to
 *                 it, one record each, in the order in which they were done
 *   FAULT_BOOT_ID a file that is read in place of /proc/sys/kernel/random/boot_id
 *   FAULT_CLOCK   a file of eight bytes: nanoseconds by which the wall clock is off
 *
 * Calls go to the kernel by syscall(2), so that nothing depends on which libc is beneath. What
 * glibc writes from within itself (fwrite) is not seen; the reader of the record compares what it
 * makes of it with the folder as it really is, and says so where anything was missed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, LINK, SYMLINK, SEND, UNKNOWN };

struct record {
    uint32_t magic, size;
    uint32_t op, pid;
    uint64_t begin; /* size of the log when the call began */
    uint64_t inode;
    int64_t offset, length, mtime;
    uint32_t mode, existed, path, other, data, unused;
};

static const char *root, *log_path, *boot_id;
static size_t root_length;
static int log_fd = -1;
static const volatile int64_t *clock_off;

__attribute__((constructor)) static void begin(void) {
    root = getenv("FAULT_ROOT");
    log_path = getenv("FAULT_RECORD");
    boot_id = getenv("FAULT_BOOT_ID");
    if (!root)
        log_path = NULL;
    root_length = root ? strlen(root) : 0;
    const char *clock = getenv("FAULT_CLOCK");
    if (clock) {
        int fd = syscall(SYS_openat, AT_FDCWD, clock, O_RDONLY | O_CLOEXEC, 0);
        if (fd >= 0) {
            void *page = mmap(NULL, 8, PROT_READ, MAP_SHARED, fd, 0);
            if (page != MAP_FAILED)
                clock_off = page;
            syscall(SYS_close, fd);
        }
    }
}

/* --- the record */

static int the_log(void) {
    struct stat status;
    if (log_fd < 0 || syscall(SYS_fstat, log_fd, &status) < 0) {
        int fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0)
            return -1;
        log_fd = syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 700); /* out of everybody's way */
        if (log_fd < 0)
            return log_fd = fd;
        syscall(SYS_close, fd);
    }
    return log_fd;
}

static uint64_t now(void) {
    struct stat status;
    if (!log_path || the_log() < 0 || syscall(SYS_fstat, log_fd, &status) < 0)
        return 0;
    return status.st_size;
}

static int is_ours(const char *path) {
    return log_path && path && strncmp(path, root, root_length) == 0 &&
           (path[root_length] == '/' || path[root_length] == 0);
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return is_ours(path);
}

static int path_at(int folder, const char *name, char *path) {
    if (!log_path || !name)
        return 0;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char base[PATH_MAX];
        if (folder == AT_FDCWD) {
            if (syscall(SYS_getcwd, base, sizeof base) < 0)
                return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
            if (length <= 0)
                return 0;
            base[length] = 0;
        }
        if (strlen(base) + strlen(name) + 2 > PATH_MAX)
            return 0;
        strcpy(path, base);
        strcat(path, "/");
        strcat(path, name);
    }
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/')
        path[--length] = 0;
    return is_ours(path);
}

static void note(struct record *record, const char *path, const char *other, const void *data,
                 size_t length) {
    int before = errno;
    record->magic = 0x464c5431;
    record->pid = getpid();
    record->path = path ? strlen(path) : 0;
    record->other = other ? strlen(other) : 0;
    record->data = length;
    record->size = sizeof *record + record->path + record->other + length;
    struct iovec parts[4] = {{record, sizeof *record},
                             {(void *)path, record->path},
                             {(void *)other, record->other},
                             {(void *)data, length}};
    if (the_log() >= 0)
        syscall(SYS_writev, log_fd, parts, 4);
    errno = before;
}

static int64_t mtime(const struct stat *status) {
    return status->st_mtim.tv_sec * 1000000000LL + status->st_mtim.tv_nsec;
}

/* --- opening */

static int opened(int folder, const char *name, int flags, mode_t mode) {
    if (boot_id && name && strcmp(name, "/proc/sys/kernel/random/boot_id") == 0)
        name = boot_id;
    char path[PATH_MAX];
    int ours = (flags & (O_CREAT | O_TRUNC)) && path_at(folder, name, path);
    struct record record = {.op = OPEN, .begin = ours ? now() : 0};
    struct stat status;
    if (ours)
        record.existed = syscall(SYS_newfstatat, folder, name, &status, 0) == 0;
    int fd = syscall(SYS_openat, folder, name, flags, mode);
    if (ours && fd >= 0 && (!record.existed || (flags & O_TRUNC))) {
        syscall(SYS_fstat, fd, &status);
        record.inode = status.st_ino;
        record.mode = status.st_mode;
        record.mtime = mtime(&status);
        note(&record, path, NULL, NULL, 0);
    }
    return fd;
}

#define OPENS(name)                                       \
    int name(const char *path, int flags, ...) {          \
        mode_t mode = 0;                                  \
        if (flags & (O_CREAT | O_TMPFILE)) {              \
            va_list rest;                                 \
            va_start(rest, flags);                        \
            mode = va_arg(rest, mode_t);                  \
            va_end(rest);                                 \
        }                                                 \
        return opened(AT_FDCWD, path, flags, mode);       \
    }
#define OPENS_AT(name)                                    \
    int name(int folder, const char *path, int flags, ...) { \
        mode_t mode = 0;                                  \
        if (flags & (O_CREAT | O_TMPFILE)) {              \
            va_list rest;                                 \
            va_start(rest, flags);                        \
            mode = va_arg(rest, mode_t);                  \
            va_end(rest);                                 \
        }                                                 \
        return opened(folder, path, flags, mode);         \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int creat(const char *path, mode_t mode) {
    return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

static FILE *stream(const char *call, const char *name, const char *mode) {
    FILE *(*real)(const char *, const char *) = dlsym(RTLD_NEXT, call);
    if (boot_id && name && strcmp(name, "/proc/sys/kernel/random/boot_id") == 0)
        name = boot_id;
    char path[PATH_MAX];
    int ours = mode[0] != 'r' && path_at(AT_FDCWD, name, path);
    struct record record = {.op = OPEN, .begin = ours ? now() : 0};
    struct stat status;
    if (ours)
        record.existed = syscall(SYS_newfstatat, AT_FDCWD, name, &status, 0) == 0;
    FILE *file = real(name, mode);
    if (ours && file && (!record.existed || mode[0] == 'w')) {
        syscall(SYS_fstat, fileno(file), &status);
        record.inode = status.st_ino;
        record.mode = status.st_mode;
        record.mtime = mtime(&status);
        note(&record, path, NULL, NULL, 0);
    }
    return file;
}
FILE *fopen(const char *name, const char *mode) { return stream("fopen", name, mode); }
FILE *fopen64(const char *name, const char *mode) { return stream("fopen64", name, mode); }

/* --- content */

static void wrote(int fd, uint64_t begin, const char *path, int64_t offset, const void *data,
                  size_t length) {
    struct stat status;
    if (syscall(SYS_fstat, fd, &status) < 0 || !S_ISREG(status.st_mode))
        return;
    struct record record = {.op = WRITE,
                            .begin = begin,
                            .inode = status.st_ino,
                            .offset = offset,
                            .length = length,
                            .mtime = mtime(&status)};
    note(&record, path, NULL, data, length);
}

ssize_t write(int fd, const void *data, size_t length) {
    char path[PATH_MAX];
    int ours = log_path && path_of(fd, path);
    uint64_t begin = ours ? now() : 0;
    ssize_t done = syscall(SYS_write, fd, data, length);
    if (ours && done > 0)
        wrote(fd, begin, path, syscall(SYS_lseek, fd, 0, SEEK_CUR) - done, data, done);
    return done;
}

static ssize_t wrote_at(int fd, const void *data, size_t length, off_t offset) {
    char path[PATH_MAX];
    int ours = log_path && path_of(fd, path);
    uint64_t begin = ours ? now() : 0;
    ssize_t done = syscall(SYS_pwrite64, fd, data, length, offset);
    if (ours && done > 0)
        wrote(fd, begin, path, offset, data, done);
    return done;
}
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
    return wrote_at(fd, data, length, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) {
    return wrote_at(fd, data, length, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    int ours = log_path && path_of(fd, path);
    uint64_t begin = ours ? now() : 0;
    ssize_t done = syscall(SYS_writev, fd, parts, count);
    if (ours && done > 0) {
        off_t at = syscall(SYS_lseek, fd, 0, SEEK_CUR) - done;
        ssize_t left = done;
        for (int i = 0; i < count && left > 0; i++) {
            ssize_t length = parts[i].iov_len < (size_t)left ? (ssize_t)parts[i].iov_len : left;
            wrote(fd, begin, path, at, parts[i].iov_base, length);
            at += length;
            left -= length;
        }
    }
    return done;
}

static int cut_to(int fd, off_t length) {
    char path[PATH_MAX];
    int ours = log_path && path_of(fd, path);
    struct record record = {.op = TRUNCATE, .begin = ours ? now() : 0, .length = length};
    int result = syscall(SYS_ftruncate, fd, length);
    struct stat status;
    if (ours && result == 0 && syscall(SYS_fstat, fd, &status) == 0) {
        record.inode = status.st_ino;
        record.mtime = mtime(&status);
        note(&record, path, NULL, NULL, 0);
    }
    return result;
}
int ftruncate(int fd, off_t length) { return cut_to(fd, length); }
int ftruncate64(int fd, off_t length) { return cut_to(fd, length); }

static int sized(int fd, int mode, off_t offset, off_t length) {
    char path[PATH_MAX];
    int ours = log_path && path_of(fd, path);
    struct stat before, after;
    struct record record = {.op = TRUNCATE, .begin = ours ? now() : 0};
    syscall(SYS_fstat, fd, &before);
    int result = syscall(SYS_fallocate, fd, mode, offset, length);
    if (ours && result == 0 && syscall(SYS_fstat, fd, &after) == 0 &&
        after.st_size != before.st_size) {
        record.inode = after.st_ino;
        record.length = after.st_size;
        record.mtime = mtime(&after);
        note(&record, path, NULL, NULL, 0);
    }
    return result;
}
int fallocate(int fd, int mode, off_t offset, off_t length) {
    return sized(fd, mode, offset, length);
}
int fallocate64(int fd, int mode, off_t offset, off_t length) {
    return sized(fd, mode, offset, length);
}
int posix_fallocate(int fd, off_t offset, off_t length) {
    return sized(fd, 0, offset, length) == 0 ? 0 : errno;
}
int posix_fallocate64(int fd, off_t offset, off_t length) {
    return posix_fallocate(fd, offset, length);
}

/* Whoever copies by these takes the slow way instead, which is seen. */
ssize_t sendfile(int to, int from, off_t *offset, size_t length) {
    char path[PATH_MAX];
    if (log_path && path_of(to, path)) {
        errno = EINVAL;
        return -1;
    }
    return syscall(SYS_sendfile, to, from, offset, length);
}
ssize_t sendfile64(int to, int from, off_t *offset, size_t length) {
    return sendfile(to, from, offset, length);
}
ssize_t copy_file_range(int from, off_t *at, int to, off_t *there, size_t length,
                        unsigned int flags) {
    char path[PATH_MAX];
    if (log_path && path_of(to, path)) {
        errno = EINVAL;
        return -1;
    }
    return syscall(SYS_copy_file_range, from, at, to, there, length, flags);
}

static int synced(int fd, int call) {
    char path[PATH_MAX];
    int ours = log_path && path_of(fd, path);
    struct record record = {.op = SYNC, .begin = ours ? now() : 0};
    int result = syscall(call, fd);
    struct stat status;
    if (ours && result == 0 && syscall(SYS_fstat, fd, &status) == 0) {
        record.inode = status.st_ino;
        record.mode = status.st_mode;
        note(&record, path, NULL, NULL, 0);
    }
    return result;
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

/* --- names */

static int renamed(int from, const char *old, int to, const char *new, unsigned flags) {
    char path[PATH_MAX], other[PATH_MAX];
    int ours = path_at(from, old, path) + path_at(to, new, other);
    struct record record = {.op = ours == 2 ? RENAME : UNKNOWN, .begin = ours ? now() : 0};
    int result = syscall(SYS_renameat2, from, old, to, new, flags);
    if (ours && result == 0)
        note(&record, path, other, NULL, 0);
    return result;
}
int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) {
    return renamed(from, old, to, new, 0);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    return renamed(from, old, to, new, flags);
}

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    int ours = path_at(folder, name, path);
    struct record record = {.op = flags & AT_REMOVEDIR ? RMDIR : UNLINK,
                            .begin = ours ? now() : 0};
    int result = syscall(SYS_unlinkat, folder, name, flags);
    if (ours && result == 0)
        note(&record, path, NULL, NULL, 0);
    return result;
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int remove(const char *name) {
    int result = unlink(name);
    return result < 0 && errno == EISDIR ? rmdir(name) : result;
}

int mkdirat(int folder, const char *name, mode_t mode) {
    char path[PATH_MAX];
    int ours = path_at(folder, name, path);
    struct record record = {.op = MKDIR, .begin = ours ? now() : 0};
    int result = syscall(SYS_mkdirat, folder, name, mode);
    struct stat status;
    if (ours && result == 0 && syscall(SYS_newfstatat, folder, name, &status, 0) == 0) {
        record.inode = status.st_ino;
        record.mode = status.st_mode;
        note(&record, path, NULL, NULL, 0);
    }
    return result;
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    char path[PATH_MAX], other[PATH_MAX];
    int ours = path_at(from, old, path) + path_at(to, new, other);
    struct record record = {.op = ours == 2 ? LINK : UNKNOWN, .begin = ours ? now() : 0};
    int result = syscall(SYS_linkat, from, old, to, new, flags);
    if (ours && result == 0)
        note(&record, path, other, NULL, 0);
    return result;
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int symlinkat(const char *target, int folder, const char *name) {
    char path[PATH_MAX];
    int ours = path_at(folder, name, path);
    struct record record = {.op = SYMLINK, .begin = ours ? now() : 0};
    int result = syscall(SYS_symlinkat, target, folder, name);
    if (ours && result == 0)
        note(&record, path, target, NULL, 0);
    return result;
}
int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }

/* An answer leaves here: what came before it was done before the client knew. */
ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    if (log_path) {
        struct record record = {.op = SEND, .begin = now()};
        note(&record, NULL, NULL, NULL, 0);
    }
    return syscall(SYS_sendmsg, fd, message, flags);
}

/* --- the clock */

static int is_wall(clockid_t which) {
    return which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE || which == CLOCK_TAI;
}

int clock_gettime(clockid_t which, struct timespec *at) {
    int result = syscall(SYS_clock_gettime, which, at);
    if (result == 0 && clock_off && is_wall(which)) {
        int64_t all = at->tv_sec * 1000000000LL + at->tv_nsec + *clock_off;
        at->tv_sec = all / 1000000000LL;
        at->tv_nsec = all % 1000000000LL;
    }
    return result;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    (void)zone;
    struct timespec exact;
    int result = clock_gettime(CLOCK_REALTIME, &exact);
    at->tv_sec = exact.tv_sec;
    at->tv_usec = exact.tv_nsec / 1000;
    return result;
}

time_t time(time_t *at) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (at)
        *at = exact.tv_sec;
    return exact.tv_sec;
}
