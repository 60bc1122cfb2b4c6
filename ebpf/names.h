// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// Names: who asks for the addresses of one is answered where the query enters the sandbox, by the packet that has
// asked. So it costs neither the agent's time nor a wait for it. Whatever is not as plain as that goes on to the
// agent, which answers all of these the same (src/dns/answer.rs).
#pragma once
#include "packet.h"

#define DNS_PORT 53
// Types and the class of what is asked for (RFC 1035, 3.2; RFC 3596, 2.1).
#define TYPE_A 1
#define TYPE_AAAA 28
#define TYPE_OPT 41
#define CLASS_IN 1
// The largest answer that who asks is told to expect, as in src/dns/answer.rs.
#define LARGEST_ANSWER 1232

// The header of a message (RFC 1035, 4.1.1).
struct message {
    __be16 id;
    // From QR to RD, and from RA to the code.
    __u8 kind;
    __u8 flags;
    __be16 questions;
    __be16 answers;
    __be16 authorities;
    __be16 additionals;
};

#define IS_ANSWER 0x80
#define IS_AUTHORITATIVE 0x04
#define WANTS_RECURSION 0x01
#define CAN_RECURSE 0x80
#define KNOWS_VALIDATION 0x20

// A pointer to a part of the message (RFC 1035, 4.1.4), and the name that is asked for: it follows the header.
#define POINTER 0xc000
#define ASKED (POINTER | sizeof(struct message))

// The end of a question: that of the name, the root's label, type and class. Of bytes, since it may lie anywhere.
struct ending {
    // The last byte of the name.
    __u8 last;
    __u8 root;
    __u8 type[2];
    __u8 class[2];
};

// What of that is not the name.
#define ENDING (sizeof(struct ending) - 1)

// A record without options that says how much who asks takes (RFC 6891, 6.1.2), and no more: OPT_BYTES.
struct opt {
    __u8 root;
    __u8 type[2];
    __u8 size[2];
    __u8 code;
    __u8 version;
    __u8 signing;
    __u8 zero[4];
};

#define OPT_BYTES 11

// A record of an address (RFC 1035, 4.1.3).
struct record {
    __be16 name;
    __be16 type;
    __be16 class;
    __be16 ttl[2];
    __be16 length;
    __be16 address[];
};

// The shortest one.
#define RECORD_IPV4 16

// A query as it lies in its packet.
struct query {
    // Where the message begins, and where the question ends.
    __u32 start;
    __u32 end;
    __u16 type;
    bool has_opt;
    // What was after the question: a record, or nothing.
    struct opt opt;
    struct message message;
    // Where the domain begins in the name; 0: it is a short form.
    __u32 domain;
};

// Whether a packet is for a name server, to see which costs the others next to nothing.
static __always_inline bool asks_for_name(struct __sk_buff *skb, const struct packet *packet) {
    __be16 port;
    return packet->tuple.protocol == IPPROTO_UDP &&
           !load(skb, packet->transport + offsetof(struct udphdr, dest), &port, sizeof port) &&
           port == bpf_htons(DNS_PORT);
}

// Letters in lower case (RFC 4343), eight bytes at a time.
static __always_inline __u64 lower(__u64 bytes) {
    __u64 ones = 0x0101010101010101, low = bytes & 0x7f * ones;
    // In the highest bit of each byte: whether it is at least an A, and whether it is more than a Z.
    __u64 letters = (low + (0x80 - 'A') * ones) & ~(low + (0x7f - 'Z') * ones) & ~bytes & 0x80 * ones;
    return bytes | letters >> 2;
}

// Reads a part of a name into a key that is 0 otherwise.
static __always_inline int
read_part(struct __sk_buff *skb, struct name_key *key, __u32 at, __u32 length) {
    __u64 *words = (__u64 *)key->bytes;
#pragma unroll
    for (int word = 0; word < NAME_PART / 8; word++)
        words[word] = 0;
    // A label has a letter at least.
    if (!is_between(&length, 2, NAME_PART) || bpf_skb_load_bytes(skb, at, key->bytes, length))
        return -1;
#pragma unroll
    for (int word = 0; word < NAME_PART / 8; word++)
        words[word] = lower(words[word]);
    return 0;
}

// Reads what surrounds the name of a query (RFC 1035, 4.1); fails for what is not a plain query for addresses.
SEPARATE int read_query(struct __sk_buff *skb, struct packet *packet, struct query *query) {
    struct udphdr udp;
    struct ending ending;
    if (!packet || !query || load(skb, packet->transport, &udp, sizeof udp))
        return -1;
    query->start = packet->transport + sizeof udp;
    query->end = packet->transport + bpf_ntohs(udp.len);
    struct message *message = &query->message;
    if (skb->gso_size || query->end != skb->len || load(skb, query->start, message, sizeof *message))
        return -1;
    query->has_opt = message->additionals == bpf_htons(1);
    if (message->kind & ~WANTS_RECURSION || message->flags & ~KNOWS_VALIDATION ||
        message->questions != bpf_htons(1) || message->answers || message->authorities ||
        (message->additionals && !query->has_opt))
        return -1;
    if (query->has_opt) {
        struct opt *opt = &query->opt;
        query->end -= OPT_BYTES;
        if (bpf_skb_load_bytes(skb, query->end, opt, OPT_BYTES) || opt->root || opt->type[0] ||
            opt->type[1] != TYPE_OPT || opt->code || opt->version || opt->signing & 0x7f || opt->zero[0] ||
            opt->zero[1] || opt->zero[2])
            return -1;
    }
    if (bpf_skb_load_bytes(skb, query->end - sizeof ending, &ending, sizeof ending) || !ending.last ||
        ending.root || ending.type[0] || ending.class[0] || ending.class[1] != CLASS_IN)
        return -1;
    query->type = ending.type[1];
    return query->type == TYPE_A || query->type == TYPE_AAAA ? 0 : -1;
}

// Looks up what the name has that is asked for; fails where the agent may know.
static __always_inline int look_up(
    struct __sk_buff *skb, __u32 network, struct query *query, struct name_key *key, struct name *name) {
    __u32 at = query->start + sizeof(struct message);
    __u8 length;
    if (load(skb, at, &length, sizeof length) || !length || length >= NAME_PART)
        return -1;
    __u32 first = length + 1, rest = query->end - ENDING - at;
    if (rest < first || rest > 2 * NAME_PART)
        return -1;
    rest -= first;
    key->network = network;
    key->zero = 0;
    if (rest) {
        if (read_part(skb, key, at + first, rest))
            return -1;
        __u32 *domain = bpf_map_lookup_elem(&suffixes, key);
        if (!domain)
            return -1;
        query->domain = *domain ? first + *domain : 0;
    }
    if (read_part(skb, key, at, first))
        return -1;
    struct name *found = bpf_map_lookup_elem(&names, key);
    if (!found)
        return -1;
    *name = *found;
    // Its entry may become another's as soon as the agent writes.
    return bpf_map_lookup_elem(&names, key) == found ? 0 : -1;
}

// Turns a packet with a query round: its headers say so, and that it has grown by so much. `change` is what the
// message's sum has changed by.
SEPARATE int turn_round(struct __sk_buff *skb, struct packet *packet, __u32 grown, __u32 change) {
    struct udphdr udp;
    if (!packet || load(skb, packet->transport, &udp, sizeof udp))
        return -1;
    __be16 port = udp.source, old = udp.len;
    udp.source = udp.dest;
    udp.dest = port;
    udp.len = bpf_htons(bpf_ntohs(old) + grown);
    if (turn_frame(skb) || bpf_skb_store_bytes(skb, packet->transport, &udp, sizeof udp, 0))
        return -1;
    if (packet->ipv4) {
        struct iphdr ip;
        if (load(skb, ETH_HLEN, &ip, sizeof ip))
            return -1;
        __be32 source = ip.saddr;
        ip.saddr = ip.daddr;
        ip.daddr = source;
        ip.tot_len = bpf_htons(bpf_ntohs(ip.tot_len) + grown);
        ip.check = 0;
        ip.check = checksum_of(&ip);
        if (bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof ip, 0))
            return -1;
    } else {
        struct ipv6hdr ip;
        if (load(skb, ETH_HLEN, &ip, sizeof ip))
            return -1;
        struct in6_addr source = ip.saddr;
        ip.saddr = ip.daddr;
        ip.daddr = source;
        ip.payload_len = bpf_htons(bpf_ntohs(ip.payload_len) + grown);
        if (bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof ip, 0))
            return -1;
    }
    // The length counts twice, once as what the header is preceded by in the sum (RFC 768).
    __u32 at = packet->transport + offsetof(struct udphdr, check);
    return bpf_l4_csum_replace(skb, at, old, udp.len, BPF_F_MARK_MANGLED_0 | BPF_F_PSEUDO_HDR | 2) ||
           bpf_l4_csum_replace(skb, at, old, udp.len, BPF_F_MARK_MANGLED_0 | 2) ||
           bpf_l4_csum_replace(skb, at, 0, change, BPF_F_MARK_MANGLED_0);
}

// Writes what comes after the question; gives how long that is; 0: it is not known.
static __always_inline __u32 write_tail(
    __u8 *tail, const struct query *query, const struct name *name, const struct telling *how, bool has_address) {
    struct record *record = (struct record *)tail;
    __u32 length = offsetof(struct record, address);
    bool is_ipv4 = query->type == TYPE_A;
    __builtin_memset(tail, 0, TAIL);
    if (has_address) {
        record->name = bpf_htons(ASKED);
        record->type = bpf_htons(query->type);
        record->class = bpf_htons(CLASS_IN);
        __builtin_memcpy(record->ttl, &how->ttl, sizeof how->ttl);
        if (is_ipv4) {
            record->length = bpf_htons(sizeof name->ipv4);
            __builtin_memcpy(record->address, &name->ipv4, sizeof name->ipv4);
            length += sizeof name->ipv4;
        } else {
            record->length = bpf_htons(sizeof name->ipv6);
            __builtin_memcpy(record->address, &name->ipv6, sizeof name->ipv6);
            length += sizeof name->ipv6;
        }
    } else {
        __builtin_memcpy(tail, how->nothing, NOTHING);
        // A short form is a zone by itself.
        record->name = bpf_htons(ASKED + query->domain);
        length = how->length;
    }
    if (!length || length > NOTHING)
        return 0;
    if (query->has_opt) {
        struct opt *opt = (struct opt *)(tail + length);
        opt->type[1] = TYPE_OPT;
        opt->size[0] = LARGEST_ANSWER >> 8;
        opt->size[1] = LARGEST_ANSWER & 0xff;
        opt->signing = query->opt.signing;
        length += OPT_BYTES;
    }
    return length;
}

// Makes a query its own answer, with so many bytes after the question: an address, or the record that there is none.
static __always_inline int answer_query(
    struct __sk_buff *skb,
    struct packet *packet,
    struct query *query,
    bool has_address,
    __u8 *tail,
    __u32 length) {
    __u32 old = skb->len;
    struct message message = query->message;
    message.kind |= IS_ANSWER | IS_AUTHORITATIVE;
    message.flags = CAN_RECURSE;
    message.answers = bpf_htons(has_address);
    message.authorities = bpf_htons(!has_address);
    __s64 change = bpf_csum_diff((__be32 *)&query->opt, sizeof query->opt, (__be32 *)tail, TAIL, 0);
    __u16 sum = fold(change);
    // Where the question ends at an odd place, the bytes of each pair are summed up the other way round.
    if ((query->end - query->start) & 1)
        sum = sum << 8 | sum >> 8;
    change = bpf_csum_diff((__be32 *)&query->message, sizeof message, (__be32 *)&message, sizeof message, sum);
    if (!is_between(&length, RECORD_IPV4, TAIL) || bpf_skb_change_tail(skb, query->end + length, 0))
        return PASS;
    if (bpf_skb_store_bytes(skb, query->start, &message, sizeof message, 0) ||
        bpf_skb_store_bytes(skb, query->end, tail, length, 0) ||
        turn_round(skb, packet, query->end + length - old, change))
        return lost(packet);
    note(EVENT_NAME_TOLD);
    return bpf_redirect_peer(skb->ifindex, 0);
}

// Whether names are answered here, and what is said of them is still true.
static __always_inline struct telling *told_by(__u32 network, const struct address *server) {
    __u32 zero = 0;
    struct place place = {.network = network, .address = *server};
    struct telling *how = bpf_map_lookup_elem(&telling, &zero);
    if (!how || !bpf_map_lookup_elem(&servers, &place))
        return NULL;
    return (__s64)(how->until - bpf_ktime_get_coarse_ns()) > 0 ? how : NULL;
}

// Answers a query for the addresses of a name, where what it has is known here.
SEPARATE int answer_name(struct __sk_buff *skb, struct packet *packet) {
    __u32 zero = 0;
    struct query query = {};
    struct name name;
    struct scratch *scratch = bpf_map_lookup_elem(&scratches, &zero);
    if (!packet || !scratch || !packet->plain || skb->pkt_type != PACKET_HOST)
        return PASS;
    __u32 network = packet->tuple.network;
    struct telling *how = told_by(network, &packet->tuple.destination);
    if (!how || read_query(skb, packet, &query) || look_up(skb, network, &query, &scratch->key, &name))
        return PASS;
    bool has_address = name.has & (query.type == TYPE_A ? NAME_IPV4 : NAME_IPV6);
    __u32 length = write_tail(scratch->tail, &query, &name, how, has_address);
    return answer_query(skb, packet, &query, has_address, scratch->tail, length);
}
