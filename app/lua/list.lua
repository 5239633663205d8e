-- A page of tasks, newest first; ties by id, byte by byte, as the sorted sets have them.
-- KEYS: the sets of each union, one union after another; those of one union are disjoint.
-- ARGV: offset, limit, at most so many steps, as JSON how many sets each union has and the ways to the list
-- [union to walk, [unions that each task must be in besides]], organisation, created from, created until, the score and
-- id after which the page begins ('' '': at the start), then the fields to answer with.
-- The way with the fewest tasks is walked. Where it has no further unions, the total is exact. Else it counts what the
-- walk saw: from the start everything up to so many steps, from a cursor no more than the page; `capped` says that.
-- Answers {total, capped, score and id up to which the page is complete ('' '': to the end), {values…, id, score}…}.
local offset, limit, steps = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local sizes, ways = unpack(cjson.decode(ARGV[6]))
local org, since, till, after_score, after_id = ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11]
local resumed = after_score ~= ''
local wanted = {}
for i = 12, #ARGV do wanted[#wanted + 1] = ARGV[i] end
-- So many members are read, or looked up, by one call.
local SHARE = 200

-- Lua's own comparison is that of the server's locale.
local function later_id(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x > y end
  end
  return #a > #b
end

local function newer(a, b)
  if a.score ~= b.score then return a.score > b.score end
  return later_id(a.id, b.id)
end

-- How many members of the set stand before the page's cursor, or at it.
local function passed(set)
  local low = redis.call('ZCOUNT', set, '(' .. after_score, '+inf')
  local high = low + redis.call('ZCOUNT', set, after_score, after_score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    local id = redis.call('ZREVRANGE', set, middle, middle)[1]
    if later_id(after_id, id) then high = middle else low = middle + 1 end
  end
  return low
end

local unions, first = {}, 1
for i, size in ipairs(sizes) do
  unions[i] = { unpack(KEYS, first, first + size - 1) }
  first = first + size
end

local walked, checks, members = nil, nil, nil
for _, way in ipairs(ways) do
  local count = 0
  for _, set in ipairs(unions[way[1]]) do count = count + redis.call('ZCOUNT', set, since, till) end
  if not walked or count < members then
    walked, checks, members = unions[way[1]], way[2], count
  end
end
local filtered = #checks > 0

-- The sets with what is left of each: its ranks from `rank` to before `stop`, and where several are merged, its newest
-- member that was not walked yet; the set with the newest of these stands first. A single set is read without scores,
-- which cost as much as the ids.
local heads, scores = {}, {}
local function advance(head)
  head.at = head.at + 2
  if not head.share[head.at] then
    if head.rank >= head.stop then return false end
    local next_rank = math.min(head.rank + head.size, head.stop)
    head.share = redis.call('ZREVRANGE', head.set, head.rank, next_rank - 1, 'WITHSCORES')
    head.rank, head.at = next_rank, 1
  end
  head.id, head.score = head.share[head.at], tonumber(head.share[head.at + 1])
  return true
end
local skipped, size = 0, SHARE
if not filtered then
  size = math.min(SHARE, offset + limit)
  -- A single set is entered where the page begins, however deep.
  if #walked == 1 then skipped = offset end
end
for _, set in ipairs(walked) do
  local rank = till == '+inf' and 0 or redis.call('ZCOUNT', set, '(' .. till, '+inf')
  local stop = rank + redis.call('ZCOUNT', set, since, till)
  if resumed then rank = math.max(rank, passed(set)) end
  local head = { set = set, rank = rank + skipped, stop = stop, share = {}, at = 1, size = size }
  if head.rank < stop and (#walked == 1 or advance(head)) then heads[#heads + 1] = head end
end
if #walked > 1 then table.sort(heads, newer) end

-- The ids of the next so many of the walk.
local function read(count)
  local head = heads[1]
  if #walked == 1 then
    local next_rank = math.min(head.rank + count, head.stop)
    local ids = redis.call('ZREVRANGE', head.set, head.rank, next_rank - 1)
    head.rank = next_rank
    if next_rank == head.stop then heads = {} end
    return ids
  end
  local ids = {}
  for n = 1, count do
    head = heads[1]
    if not head then break end
    ids[n] = head.id
    scores[head.id] = head.score
    if advance(head) then
      local i = 1
      while heads[i + 1] and newer(heads[i + 1], head) do
        heads[i] = heads[i + 1]
        i = i + 1
      end
      heads[i] = head
    else
      table.remove(heads, 1)
    end
  end
  return ids
end

-- Of these the ones that are in each of the further unions.
local function fitting(ids)
  for _, check in ipairs(checks) do
    if #ids == 0 then break end
    local hits = {}
    for _, set in ipairs(unions[check]) do
      for i, score in ipairs(redis.call('ZMSCORE', set, unpack(ids))) do
        if score then hits[i] = true end
      end
    end
    local left, n = {}, 0
    for i, id in ipairs(ids) do
      if hits[i] then
        n = n + 1
        left[n] = id
      end
    end
    ids = left
  end
  return ids
end

local page, fit, last, taken = {}, skipped, nil, 0
local whole = filtered and not resumed
while heads[1] and taken < steps and (whole or #page < limit) do
  local ids = read(math.min(size, steps - taken))
  taken = taken + #ids
  last = ids[#ids]
  ids = fitting(ids)
  for i = math.max(1, offset - fit + 1), math.min(#ids, offset - fit + limit) do page[#page + 1] = ids[i] end
  fit = fit + #ids
end

local function score_of(id) return digits(scores[id] or tonumber(redis.call('ZSCORE', walked[1], id))) end

local total, capped = members, heads[1] and #page < limit
if filtered then total, capped = fit, heads[1] or resumed end
local answer = { digits(total), capped and '1' or '0', '', '' }
if heads[1] or fit > offset + #page then
  if #page == limit then last = page[limit] end
  answer[3], answer[4] = score_of(last), last
end
for _, id in ipairs(page) do
  local values = {}
  if #wanted > 0 then values = redis.call('HMGET', key('task', org .. ':' .. id), unpack(wanted)) end
  values[#wanted + 1], values[#wanted + 2] = id, score_of(id)
  answer[#answer + 1] = values
end
return answer
