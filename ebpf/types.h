// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What the programs and the agent share: keys and values of the maps. The agent has the same structures
// in src/kernel/ebpf/layout.rs. Addresses and ports are in network byte order, all else in the host's.
// Every byte is a field: a key is compared with all of its bytes.
#pragma once
#include <linux/types.h>

// An address; one of IPv4 is mapped into IPv6 (RFC 4291, 2.5.5.2). It is copied and compared by halves.
struct address {
    union {
        __be32 words[4];
        __u64 halves[2];
    };
};

// An Ethernet address, in words because those are copied faster.
struct mac {
    __be16 words[3];
};

// An address in a network; the key of `addresses`.
struct place {
    __u32 network;
    __u32 zero;
    struct address address;
};

// It is a service's: connections to it are balanced.
#define ADDRESS_SERVICE 1
// It is a gateway, from which backends that meet themselves are spoken to.
#define ADDRESS_GATEWAY 2
// It is a container's of this node.
#define ADDRESS_CONTAINER 3
// It is a service's of which something is outside of the overlay: only its packets can be balanced.
#define ADDRESS_OUTSIDE 4

// What an address means.
struct meaning {
    __u32 kind;
    // Of a container's: the device that leads to it, in its sandbox.
    __u32 interface;
    // The largest packet that it takes.
    __u32 mtu;
    // The device in the host's namespace by which packets cross into its sandbox; 0: the kernel has them.
    __u32 crossing;
    // Its Ethernet address.
    struct mac mac;
    // Whether anything is balanced in its network.
    __u16 balances;
};

// A range of addresses in a network that another node has; the key of `ways` (`struct bpf_lpm_trie_key`).
struct range {
    // How many bits of what follows count.
    __u32 bits;
    __u32 network;
    struct address address;
};

// How packets get there: from which address to which, between which Ethernet addresses in the tunnel.
struct way {
    struct address local;
    struct address remote;
    struct mac local_mac;
    struct mac remote_mac;
    // The largest packet that the way takes.
    __u32 mtu;
    // The device in the sandbox by which they cross into the host's namespace; 0: the kernel has them.
    __u32 crossing;
    __be16 port;
    __u16 zero;
};

// What a packet must be for, to be balanced; the key of `fronts`. Protocol and port 0 mean all.
struct front_key {
    __u32 network;
    __be16 port;
    __u8 protocol;
    __u8 zero;
    struct address address;
};

enum scheduler {
    // The slots in turn.
    SCHEDULER_TURN = 0,
    // The slot that the client's address leads to.
    SCHEDULER_HASH = 1,
    // The backend with the fewest connections for its weight.
    SCHEDULER_LEAST = 2,
};

// How many slots lie in the front itself.
#define FRONT_SLOTS 8
// How many lie together in a value of `slots`.
#define BLOCK_SLOTS 64

struct front {
    __u32 id;
    __u32 scheduler;
    // For how many seconds a client keeps its backend; 0: it does not.
    __u32 affinity;
    // How many slots there are; 0: nobody takes connections.
    __u32 slots;
    // Whose turn it is: counted by the programs.
    __u32 turn;
    // The backends' numbers, where all slots have room here.
    __u32 first[FRONT_SLOTS];
};

// The key of `slots`, for fronts with more.
struct block_key {
    __u32 front;
    // Which of its blocks.
    __u32 block;
};

// The numbers of the backends in some slots.
struct block {
    __u32 backends[BLOCK_SLOTS];
};


struct backend {
    struct address address;
    // 0: the port that the client asked for.
    __be16 port;
    __u16 zero;
    __u32 front;
    // 0: it gets no new connections.
    __u32 weight;
    // How many connections it has, about: the programs count what they see, the agent puts it right.
    __u32 open;
};

// Counted for each backend, on each processor. The programs make the entry when the first packet comes; the
// agent removes it after the backend's own. Without either a backend is gone, and so are its connections.
struct counts {
    __u64 connections;
    __u64 incoming_packets;
    __u64 incoming_bytes;
    __u64 outgoing_packets;
    __u64 outgoing_bytes;
};

// A packet of a connection as it arrives; the key of `connections`.
struct tuple {
    struct address source;
    struct address destination;
    __be16 source_port;
    __be16 destination_port;
    __u32 network;
    __u8 protocol;
    // 1: it is an answer of the backend's.
    __u8 reply;
    __u16 zero[3];
};

#define STATE_ANSWERED 1
#define STATE_CLIENT_ENDED 2
#define STATE_SERVER_ENDED 4
#define STATE_RESET 8

// What becomes of it. There are two for each connection: from the client, and to it.
struct connection {
    struct address source;
    struct address destination;
    __be16 source_port;
    __be16 destination_port;
    __u32 backend;
    // When the last packet was seen, in seconds of CLOCK_MONOTONIC.
    __u32 seen;
    // The client's device in its sandbox.
    __u32 interface;
    __u8 state;
    // 1: client and backend are one.
    __u8 loops;
    __u16 zero[3];
};

// After which silence connections end, in seconds; the value of `timeouts`, by network.
struct timeouts {
    __u32 tcp;
    __u32 tcp_fin;
    __u32 udp;
};

// Who keeps a backend; the key of `clients`.
struct client_key {
    __u32 front;
    __u32 zero;
    struct address address;
};

struct client {
    __u32 backend;
    __u32 seen;
};

// A datagram in fragments, of which only the first has ports; the key of `fragments`.
struct fragment_key {
    __u32 network;
    // The container's device: nobody else sends, or gets, its fragments.
    __u32 interface;
    struct address source;
    struct address destination;
    __be32 id;
    __u32 protocol;
};

struct ports {
    __be16 source;
    __be16 destination;
};

// A network that a container is in, with the container's addresses there; all 0: none.
struct membership {
    __u32 network;
    __u32 zero;
    struct address ipv4;
    struct address ipv6;
};

// In how many networks services are looked for when a container's socket asks for one.
#define MEMBERSHIPS 8

// A container's namespace; the value of `namespaces`, by the kernel's number for it (SO_NETNS_COOKIE).
struct namespace {
    // Those that there are come first.
    struct membership networks[MEMBERSHIPS];
};

// It waits for an answer.
#define SOCKET_OPENING 0
// It is established.
#define SOCKET_OPEN 1
// One side has ended it.
#define SOCKET_ENDING 2

// A TCP socket that has asked for a service; the value of `sockets`, by the kernel's number for it (SO_COOKIE).
struct socket {
    // Its namespace's number.
    __u64 namespace;
    // What it has asked for.
    struct address service;
    // What it got.
    struct address backend;
    __be16 service_port;
    __be16 backend_port;
    // The backend's number.
    __u32 number;
    // When it has asked, in seconds of CLOCK_MONOTONIC.
    __u32 since;
    // `SOCKET_…`
    __u32 state;
};

// With whom a socket exchanges datagrams; the key of `datagrams`.
struct datagram_key {
    // The socket's number.
    __u64 socket;
    // For whom it sends one, or from whom it gets one.
    struct address address;
    __be16 port;
    // 1: it gets one.
    __u16 reply;
    __u32 zero;
};

// Who that is instead. There are two for each pair of a socket and a service: what is sent goes to the backend,
// what is got comes from the service.
struct datagram {
    struct address address;
    __be16 port;
    __u16 zero;
    __u32 network;
    __u32 backend;
    // When the last one was sent, in seconds of CLOCK_MONOTONIC.
    __u32 seen;
};

// The longest part of a name that is looked for: one label (RFC 1035, 2.3.4) with its length.
#define NAME_PART 64

// A part of a name in a network, in lower case as the wire has it, without the root's label, and 0 after it: its
// first label, the key of `names`, or all that follows that, the key of `suffixes`. The value of that is where in it
// the domain begins that all names of ours are below of; 0: it is a short form, without that.
struct name_key {
    __u32 network;
    __u32 zero;
    __u8 bytes[NAME_PART];
};

#define NAME_IPV4 1
#define NAME_IPV6 2

// What a name has.
struct name {
    // `NAME_IPV4`, `NAME_IPV6`, both, or none.
    __u32 has;
    __be32 ipv4;
    struct address ipv6;
};

// The longest record that says that a name has nothing of a type.
#define NOTHING 176

// With what names are answered; the only value of `telling`.
struct telling {
    // Until when, in nanoseconds of CLOCK_MONOTONIC: what an agent said that is gone becomes untrue.
    __u64 until;
    // For how many seconds an answer may be kept.
    __be32 ttl;
    // How long the record is; 0: that a name has nothing, the agent tells.
    __u32 length;
    // The record (SOA; RFC 2308, 3), and 0 after it. Its first two bytes are for its name: they point to where
    // that is.
    __u8 nothing[NOTHING];
};

// What somebody wants to see of packets; the only value of `watching`.
struct watching {
    // Until when, in nanoseconds of CLOCK_MONOTONIC; 0: nobody does.
    __u64 until;
    // One of how many packets is shown, beside those that open or end a TCP connection; 0: those only that
    // were not carried.
    __u32 every;
    // Of which network; 0: of all.
    __u32 network;
};

// Where a packet was seen.
#define POINT_FROM_CONTAINER 0
#define POINT_TO_CONTAINER 1
#define POINT_FROM_WIRE 2
#define POINT_TO_WIRE 3
// No packet yet: a socket has asked for a service.
#define POINT_SOCKET 4

// What became of it there.
#define VERDICT_KERNEL 0
#define VERDICT_CARRIED 1
#define VERDICT_DROPPED 2

// A packet, as those see it who watch; in `reports`.
struct report {
    // When, in nanoseconds of CLOCK_MONOTONIC.
    __u64 time;
    __u32 network;
    // Of the packet, without its frame.
    __u32 length;
    // As it came: addresses and ports, 0 where it has none.
    struct address source;
    struct address destination;
    // What became of its destination, where it was for a service; of its source, where it is an answer.
    struct address translated;
    __be16 source_port;
    __be16 destination_port;
    __be16 translated_port;
    __u8 protocol;
    __u8 tcp_flags;
    // `POINT_…`
    __u8 point;
    // `VERDICT_…`
    __u8 verdict;
    // Why it was not carried: one more than the event, or `REASON_ERROR`; 0: it was.
    __u8 reason;
    // 1: `translated` says something.
    __u8 is_translated;
    // Of the error by which its sender was told.
    __u8 error_type;
    __u8 error_code;
    __u16 zero;
};

// The kernel, or somebody on the way, has refused it, and told its sender so (ICMP).
#define REASON_ERROR 255

// What is counted of a node, as positions in `events`.
enum event {
    // A connection was not balanced because its table is full.
    EVENT_TABLE_FULL = 0,
    // Nobody takes connections.
    EVENT_NO_BACKEND = 1,
    // Another connection of the client's has the same ports to the same backend.
    EVENT_PORT_TAKEN = 2,
    // The source was not the container's own.
    EVENT_FOREIGN_SOURCE = 3,
    // The host has no route to the node that a packet is for.
    EVENT_NO_ROUTE = 4,
    // A packet could not be changed: there was no memory for it.
    EVENT_NO_MEMORY = 5,
    // Somebody watches, and did not read in time.
    EVENT_NOT_SHOWN = 6,
    // A query for a name was answered.
    EVENT_NAME_TOLD = 7,
    // A packet of SCTP in fragments was to get another port.
    EVENT_FRAGMENTS = 8,
    EVENTS = 9,
};
