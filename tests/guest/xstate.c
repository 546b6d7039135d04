/*
 * User-mode Linux 6.1 saves the vector registers of its processes by ptrace(2) in a buffer of 2696 bytes. On a
 * processor whose register state is larger (with AMX it has 10688), its host gives it the beginning, but takes back
 * nothing but the whole: "ptrace set fp regs failed, errno = 14", and the guest dies at once. This library, which
 * is preloaded, makes a whole of what was cut. What is missing are the tiles of AMX, which a process must ask for
 * by arch_prctl(2) and does not get in a guest: they are in their initial state.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

/* The bits of XSTATE_BV, at byte 512, whose registers lie in the beginning: all up to PKRU. */
#define WITHIN 0x3ffULL

/* Not on the stack: the stacks of a kernel are small. And of its threads only one does this. */
static unsigned char state[1 << 16];
static size_t whole;

long ptrace(enum __ptrace_request request, ...)
{
	static long (*next)(enum __ptrace_request, ...);
	struct iovec *cut, full = { state, sizeof state };
	uint64_t features;
	va_list arguments;
	void *pid, *address, *data;
	long result;

	if (!next)
		next = (long (*)(enum __ptrace_request, ...))dlsym(RTLD_NEXT, "ptrace");
	va_start(arguments, request);
	pid = va_arg(arguments, void *);
	address = va_arg(arguments, void *);
	data = va_arg(arguments, void *);
	va_end(arguments);
	cut = data;
	if ((uintptr_t)address != NT_X86_XSTATE)
		return next(request, pid, address, data);
	if (request == PTRACE_GETREGSET) {
		result = next(request, pid, address, &full);
		if (result == 0) {
			whole = full.iov_len;
			if (cut->iov_len > whole)
				cut->iov_len = whole;
			memcpy(cut->iov_base, state, cut->iov_len);
		}
		return result;
	}
	if (request == PTRACE_SETREGSET && cut->iov_len < whole) {
		memset(state, 0, whole);
		memcpy(state, cut->iov_base, cut->iov_len);
		memcpy(&features, state + 512, sizeof features);
		features &= WITHIN;
		memcpy(state + 512, &features, sizeof features);
		full.iov_len = whole;
		return next(request, pid, address, &full);
	}
	return next(request, pid, address, data);
}
