/* A stand-in for pyxis: a plugin of Slurm that starts tasks in a squashfs file, with pyxis' names for its options.
 *
 *   srun --container-image=FILE.sqsh [--container-mounts=SOURCE:TARGET[:ro],...] [--container-workdir=FOLDER] COMMAND
 *
 * As with pyxis, the root is writable and forgotten at the end, /tmp is the task's own, /proc, /sys, /dev and the files
 * that resolve names are the node's, and the image's variables (/etc/environment) win over the job's. Everything else
 * that pyxis does is missing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(container_stand_in, 1);

#define MAX_MOUNTS 32
/* Covered in the task's own view of the file system alone, so nothing has to be made on the node, or removed. */
#define STAGE "/mnt"
#define ROOT STAGE "/root"

static char image[4096], mounts[4096], workdir[4096];

static int keep(int which, const char *value, int remote) {
    char *option[] = {image, mounts, workdir};
    (void)remote;
    if (value == NULL || strlen(value) >= sizeof image) {
        slurm_error("container stand-in: an option of --container-* is empty or too long");
        return ESPANK_BAD_ARG;
    }
    strcpy(option[which], value);
    return ESPANK_SUCCESS;
}

static struct spank_option options[] = {
    {"container-image", "FILE", "[stand-in for pyxis] squashfs file to start the tasks in", 1, 0, keep},
    {"container-mounts", "SOURCE:TARGET[:ro],...", "[stand-in for pyxis] folders and files of the node", 1, 1, keep},
    {"container-workdir", "FOLDER", "[stand-in for pyxis] working directory in the container", 1, 2, keep},
    SPANK_OPTIONS_TABLE_END};

static int failed(const char *format, ...) {
    char what[8192];
    va_list arguments;
    int number = errno;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    slurm_error("container stand-in: %s: %s", what, strerror(number));
    return ESPANK_ERROR;
}

/* Makes the folders above `path`, and `path` itself as a folder, or as an empty file. */
static int make_place(char *path, int is_folder) {
    for (char *slash = strchr(path + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        int made = mkdir(path, 0755);
        *slash = '/';
        if (made != 0 && errno != EEXIST) return -1;
    }
    if (is_folder) return mkdir(path, 0755) == 0 || errno == EEXIST ? 0 : -1;
    int file = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
    return file < 0 ? -1 : close(file);
}

struct binding {
    int source;
    int read_only;
    char target[4096];
};

/* Opened before STAGE is covered, so that a source below it stays what it was. */
static int open_binding(struct binding *binding, const char *source, const char *target, int read_only) {
    binding->source = open(source, O_PATH | O_CLOEXEC);
    if (binding->source < 0) return failed("open %s", source);
    binding->read_only = read_only;
    if (target[0] != '/' || strlen(target) + sizeof ROOT > sizeof binding->target) {
        errno = EINVAL;
        return failed("mount target %s must be an absolute path", target);
    }
    snprintf(binding->target, sizeof binding->target, "%s%s", ROOT, target);
    return ESPANK_SUCCESS;
}

static int bind_it(struct binding *binding) {
    char source[64];
    struct stat what;
    snprintf(source, sizeof source, "/proc/self/fd/%d", binding->source);
    if (fstat(binding->source, &what) != 0 || make_place(binding->target, S_ISDIR(what.st_mode)) != 0)
        return failed("make %s", binding->target);
    if (mount(source, binding->target, NULL, MS_BIND | MS_REC, NULL) != 0) return failed("bind %s", binding->target);
    if (binding->read_only && mount(NULL, binding->target, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL) != 0)
        return failed("make %s read-only", binding->target);
    return ESPANK_SUCCESS;
}

/* A loop device that frees itself when the last mount of it is gone. Returns a descriptor that holds it until then. */
static int attach(int file, char device[64]) {
    struct loop_config config = {.fd = (unsigned)file,
                                 .info = {.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR}};
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    if (control < 0) return -1;
    for (int tries = 0; tries < 100; tries++) {
        int number = ioctl(control, LOOP_CTL_GET_FREE);
        if (number < 0) break;
        snprintf(device, 64, "/dev/loop%d", number);
        int loop = open(device, O_RDONLY | O_CLOEXEC);
        if (loop >= 0 && ioctl(loop, LOOP_CONFIGURE, &config) == 0) {
            close(control);
            return loop;
        }
        int number_of_error = errno;
        if (loop >= 0) close(loop);
        errno = number_of_error;
        if (errno != EBUSY) break; /* of two tasks that saw the same free device one comes second */
    }
    int number_of_error = errno;
    close(control);
    errno = number_of_error;
    return -1;
}

static int mount_image(int file) {
    char device[64];
    if (mount("tmpfs", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755") != 0) return failed("mount a tmpfs");
    if (mkdir(STAGE "/image", 0755) || mkdir(STAGE "/upper", 0755) || mkdir(STAGE "/work", 0755) || mkdir(ROOT, 0755))
        return failed("make folders");
    int loop = attach(file, device);
    if (loop < 0) return failed("attach %s to a loop device", image);
    if (mount(device, STAGE "/image", "squashfs", MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) != 0)
        return failed("mount %s", image);
    close(loop);
    if (mount("overlay", ROOT, "overlay", MS_NOSUID | MS_NODEV,
              "lowerdir=" STAGE "/image,upperdir=" STAGE "/upper,workdir=" STAGE "/work") != 0)
        return failed("mount an overlay on %s", image);
    if (mount("tmpfs", ROOT "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777") != 0) return failed("mount /tmp");
    return ESPANK_SUCCESS;
}

static int set_variables(spank_t spank) {
    char line[8192];
    FILE *file = fopen(ROOT "/etc/environment", "re");
    if (file == NULL) return errno == ENOENT ? ESPANK_SUCCESS : failed("read /etc/environment of %s", image);
    while (fgets(line, sizeof line, file) != NULL) {
        char *value = strchr(line, '=');
        line[strcspn(line, "\n")] = 0;
        if (value == NULL || value == line) continue;
        *value++ = 0;
        if (spank_setenv(spank, line, value, 1) != ESPANK_SUCCESS) slurm_error("container stand-in: cannot set %s", line);
    }
    fclose(file);
    return ESPANK_SUCCESS;
}

int slurm_spank_init(spank_t spank, int argc, char **argv) {
    (void)argc, (void)argv;
    for (struct spank_option *option = options; option->name != NULL; option++)
        if (spank_option_register(spank, option) != ESPANK_SUCCESS) return ESPANK_ERROR;
    return ESPANK_SUCCESS;
}

/* In the task's own process, still as root. */
int slurm_spank_task_init_privileged(spank_t spank, int argc, char **argv) {
    static const char *const of_the_node[] = {"/proc", "/sys", "/dev", "/etc/hosts", "/etc/nsswitch.conf", "/etc/resolv.conf"};
    struct binding bindings[MAX_MOUNTS];
    size_t count = 0;
    (void)argc, (void)argv;
    if (image[0] == 0) return ESPANK_SUCCESS;
    if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        return failed("leave the node's mounts");
    int file = open(image, O_RDONLY | O_CLOEXEC);
    if (file < 0) return failed("open --container-image=%s", image);
    for (size_t i = 0; i < sizeof of_the_node / sizeof *of_the_node; i++)
        if (open_binding(&bindings[count++], of_the_node[i], of_the_node[i], 0) != ESPANK_SUCCESS) return ESPANK_ERROR;
    char *rest = NULL;
    for (char *one = strtok_r(mounts, ",", &rest); one != NULL; one = strtok_r(NULL, ",", &rest)) {
        char *parts = NULL, *source = strtok_r(one, ":", &parts), *target = strtok_r(NULL, ":", &parts);
        char *flags = target == NULL ? NULL : strtok_r(NULL, ":", &parts);
        if (count == MAX_MOUNTS || source == NULL || (flags != NULL && strcmp(flags, "ro") != 0)) {
            errno = EINVAL;
            return failed("--container-mounts: %s is none of SOURCE, SOURCE:TARGET, SOURCE:TARGET:ro, or one too many", one);
        }
        if (open_binding(&bindings[count++], source, target == NULL ? source : target, flags != NULL) != ESPANK_SUCCESS)
            return ESPANK_ERROR;
    }
    if (mount_image(file) != ESPANK_SUCCESS) return ESPANK_ERROR;
    close(file);
    for (size_t i = 0; i < count; i++)
        if (bind_it(&bindings[i]) != ESPANK_SUCCESS) return ESPANK_ERROR;
    if (set_variables(spank) != ESPANK_SUCCESS) return ESPANK_ERROR;
    if (chroot(ROOT) != 0 || chdir("/") != 0) return failed("enter %s", image);
    return ESPANK_SUCCESS;
}

/* As the user, after Slurm has gone to the job's own working directory, if the container has one of that name. */
int slurm_spank_task_init(spank_t spank, int argc, char **argv) {
    (void)spank, (void)argc, (void)argv;
    if (image[0] == 0 || workdir[0] == 0) return ESPANK_SUCCESS;
    return chdir(workdir) == 0 ? ESPANK_SUCCESS : failed("enter --container-workdir=%s", workdir);
}
